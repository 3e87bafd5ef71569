#!/usr/bin/env bash
# Step 2 of the baselines, a sequence reward model (Bradley-Terry): trained from MODEL -> OUTPUT/SEQUENCE_FOLDER
#
# Hardware: 8 x A100 80GB with the defaults (PLAN=1 shows what other sizes need). Time: an hour or two.
# Launch:   bash training_scripts/step2_sequence.sh [options of step2_discriminator/main.py]
#           SEQUENCE_PAIRS=modified SEQUENCE_FOLDER=step2_synthetic bash training_scripts/step2_sequence.sh
# Variables with their defaults: recipe.sh, "step2_sequence.sh". Skipped when OUTPUT/SEQUENCE_FOLDER/results.json exists.

# shellcheck source=training_scripts/recipe.sh
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
prepare
read -ra revisions <<<"$REVISIONS"

command=(
  "${launcher[@]}" "${at}step2_discriminator/main.py" --deepspeed
  --objective "$SEQUENCE_OBJECTIVE"
  --pairs "$SEQUENCE_PAIRS"
  --model_name_or_path "$MODEL"
)
add_training SEQUENCE "$SEQUENCE_FOLDER" \
  --weight_decay "$SEQUENCE_WEIGHT_DECAY" --lr_scheduler_type cosine --num_warmup_steps 0
[[ $SEQUENCE_PAIRS != modified ]] || command+=(--revisions "${revisions[@]}")
[[ $SEQUENCE_PAIRS != modified || -z $EVAL_REVISIONS ]] || command+=(--eval_revisions "$EVAL_REVISIONS")
add_switches SEQUENCE

# Braces, because bash reads them whole: editing this file while it runs does no harm.
{ run_stage "$SEQUENCE_FOLDER" has_results "${command[@]}" "$@"; exit; }
