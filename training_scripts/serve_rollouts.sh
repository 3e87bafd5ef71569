#!/usr/bin/env bash
# A vLLM server that writes step 3's rollouts: --rollout vllm --vllm_server http://HOST:PORT
#
# Hardware: GPUs of its own, or a CPU. Time: starts in 1 to 3 minutes, then runs until it is stopped.
# Launch:   bash training_scripts/serve_rollouts.sh MODEL [options of vLLM's server]
#           CUDA_VISIBLE_DEVICES=6,7 TENSOR_PARALLEL=2 SERVE_DTYPE=bfloat16 bash training_scripts/serve_rollouts.sh MODEL
# MODEL is the folder that step 3 starts from (--actor_model_name_or_path). Needs .venv-vllm (setup_vllm.sh).

set -euo pipefail

: "${SERVE_HOST:=127.0.0.1}"      # address to listen at: its routes let anybody change the weights, so a private one
: "${SERVE_PORT:=8000}"
: "${SERVE_DTYPE:=auto}"          # float32, bfloat16 or float16: what step 3's --dtype is
: "${SERVE_MEMORY:=0.9}"          # share of each GPU's memory for weights and cache
: "${SERVE_CACHE_GB:=2}"          # on a CPU: memory of the cache
: "${TENSOR_PARALLEL:=1}"         # GPUs that one copy of the model is spread over
: "${MAX_MODEL_LEN:=}"            # longest prompt and answer together; empty: the model's own limit

project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
: "${VLLM_ENVIRONMENT:=$project/.venv-vllm}"
die() { printf 'error: %s\n' "$*" >&2 && exit 2; }

[[ -n ${1:-} ]] || die "name the model: bash $0 MODEL"
python=$VLLM_ENVIRONMENT/bin/python
[[ -x $python ]] || die "no $VLLM_ENVIRONMENT: make it with bash training_scripts/setup_vllm.sh"
"$python" - "$SERVE_HOST" <<'CHECK' || die "SERVE_HOST=$SERVE_HOST: whoever reaches the server can change its weights; a loopback or private address only"
import ipaddress, socket, sys
sys.exit(not all(ipaddress.ip_address(found[4][0]).is_private and not ipaddress.ip_address(found[4][0]).is_unspecified
                 for found in socket.getaddrinfo(sys.argv[1], None)))
CHECK
model=$1
shift
command=(
  "$python" -m vllm.entrypoints.openai.api_server --model "$model" --host "$SERVE_HOST" --port "$SERVE_PORT"
  --dtype "$SERVE_DTYPE" --tensor-parallel-size "$TENSOR_PARALLEL"
  --logprobs-mode processed_logprobs --generation-config vllm --weight-transfer-config '{"backend": "tlcr"}'
)
if command -v nvidia-smi >/dev/null; then
  command+=(--gpu-memory-utilization "$SERVE_MEMORY")
else
  command+=(--enforce-eager)
  export VLLM_CPU_KVCACHE_SPACE=$SERVE_CACHE_GB VLLM_CPU_OMP_THREADS_BIND=nobind
fi
[[ -z $MAX_MODEL_LEN ]] || command+=(--max-model-len "$MAX_MODEL_LEN")
unset PYTHONPATH # the trainer's packages are not for vLLM
# Registers the routes that take weights; of all plugins only ours.
export VLLM_SERVER_DEV_MODE=1 VLLM_PLUGINS=tlcr VLLM_NO_USAGE_STATS=1
exec "${command[@]}" "$@"
