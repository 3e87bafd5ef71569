#!/usr/bin/env bash
# TLCR with Llama-2-7B on full-hh-rlhf as in the paper: SFT, revisions by an external model, discriminator, PPO.
#
# Hardware: 8 x A100 80GB, 350 GB of host memory, 400 GB of disk. Time: most of a day, by estimate: an hour for SFT, two
# for the discriminator, several for PPO, and as long as the API's rate limits make the labelling (before that: its
# price). Nothing runs, and everything is shown and priced, with PLAN=1.
# Launch:   PLAN=1 bash training_scripts/run_7b.sh
#           OPENAI_API_KEY=... bash training_scripts/run_7b.sh [OUTPUT] [ZERO_STAGE]
# Several nodes with a shared file system: HOSTFILE=hostfile bash training_scripts/run_7b.sh (docs/clusters.md).
# A stopped run goes on where it was when it is started again; finished stages are skipped.

# ---- variables: those mostly changed; recipe.sh has all, with the paper's learning rates and batch sizes ----
export MODEL=${MODEL:-meta-llama/Llama-2-7b-hf}
export DATA=${DATA:-Dahoas/full-hh-rlhf}
export OUTPUT=${1:-${OUTPUT:-output/llama2-7b}}
export LABEL_BASE_URL=${LABEL_BASE_URL:-} # a reviser of your own; empty: LABEL_MODEL (gpt-6-luna) at OpenAI
export NUM_GPUS=${NUM_GPUS-8}
export HOSTFILE=${HOSTFILE:-}
if [[ -n ${2:-} ]]; then # one ZeRO stage for every model that is trained
  export SFT_ZERO_STAGE=$2 DISCRIMINATOR_ZERO_STAGE=$2 ACTOR_ZERO_STAGE=$2 CRITIC_ZERO_STAGE=$2
fi

# shellcheck source=training_scripts/recipe.sh
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
# Braces, because bash reads them whole: editing this file while it runs does no harm.
{
  prepare
  preflight
  train
  plan
  exit
}
