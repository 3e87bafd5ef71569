#!/usr/bin/env bash
# DPO, a baseline: the SFT model learns from preference pairs without a reward model -> OUTPUT/dpo
#
# Hardware: 8 x A100 80GB with the defaults (PLAN=1 shows what other sizes need). Time: an hour or two.
# Launch:   bash training_scripts/dpo.sh [options of baselines/dpo/main.py]
# Variables with their defaults: recipe.sh, "dpo.sh". Skipped when OUTPUT/dpo/results.json exists.

# shellcheck source=training_scripts/recipe.sh
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
prepare

command=(
  "${launcher[@]}" "${at}baselines/dpo/main.py" --deepspeed
  --model_name_or_path "$SFT_MODEL"
)
add_training DPO dpo \
  --weight_decay "$DPO_WEIGHT_DECAY" --beta "$DPO_BETA" \
  --lr_scheduler_type cosine --num_warmup_steps 0
add_switches DPO

# Braces, because bash reads them whole: editing this file while it runs does no harm.
{ run_stage dpo has_results "${command[@]}" "$@"; exit; }
