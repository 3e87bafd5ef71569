#!/usr/bin/env bash
# Step 1, supervised fine-tuning of MODEL on the SFT part of DATA -> OUTPUT/step1_sft
#
# Hardware: 8 x A100 80GB with the defaults (PLAN=1 shows what other sizes need). Time: minutes to an hour.
# Launch:   bash training_scripts/step1.sh [options of step1_sft/main.py]
#           MODEL=facebook/opt-1.3b NUM_GPUS=1 OUTPUT=output/opt bash training_scripts/step1.sh
# Variables with their defaults: recipe.sh, "step1.sh". Skipped when OUTPUT/step1_sft/results.json exists.

# shellcheck source=training_scripts/recipe.sh
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
prepare

command=(
  "${launcher[@]}" "${at}step1_sft/main.py" --deepspeed
  --model_name_or_path "$MODEL"
)
add_training SFT step1_sft --weight_decay "$SFT_WEIGHT_DECAY" --lr_scheduler_type cosine --num_warmup_steps 0
add_switches SFT

# Braces, because bash reads them whole: editing this file while it runs does no harm.
{ run_stage step1_sft has_results "${command[@]}" "$@"; exit; }
