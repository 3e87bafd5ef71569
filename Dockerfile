# deepspeed-chat-tlcr with everything it was tested with, on CUDA. docs/clusters.md says how to use it.
#   docker build -t tlcr . && docker run --gpus all --ipc host -v "$PWD/output:/tlcr/output" tlcr training_scripts/run_7b.sh
FROM nvidia/cuda:12.8.1-devel-ubuntu24.04

# devel, because DeepSpeed compiles its operators at their first use; pdsh and ssh start runs on several nodes.
RUN apt-get update && apt-get install -y --no-install-recommends \
        git g++ ninja-build openssh-client pdsh python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /tlcr
ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH
# Packages first: they are the slow part, and change less often than the code.
COPY requirements.txt constraints.txt ./
RUN python3 -m venv "$VIRTUAL_ENV" && pip install --no-cache-dir -c constraints.txt -r requirements.txt
COPY . .
RUN pip install --no-cache-dir --no-deps -e .

ENTRYPOINT ["bash"]
CMD ["training_scripts/run_7b.sh"]
