#!/usr/bin/env bash
# Step 2, the token-level discriminator (paper 4.2): trained from MODEL on REVISIONS -> OUTPUT/step2_discriminator
#
# Hardware: 8 x A100 80GB with the defaults (PLAN=1 shows what other sizes need). Time: an hour or two.
# Launch:   bash training_scripts/step2.sh [options of step2_discriminator/main.py]
#           REVISIONS=my_revisions.jsonl bash training_scripts/step2.sh
# Variables with their defaults: recipe.sh, "step2.sh". Skipped when OUTPUT/step2_discriminator/results.json exists.

# shellcheck source=training_scripts/recipe.sh
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
prepare
read -ra revisions <<<"$REVISIONS"

command=(
  "${launcher[@]}" "${at}step2_discriminator/main.py" --deepspeed
  --objective token
  --model_name_or_path "$MODEL"
  --revisions "${revisions[@]}"
)
add_training DISCRIMINATOR step2_discriminator \
  --weight_decay "$DISCRIMINATOR_WEIGHT_DECAY" --lr_scheduler_type cosine --num_warmup_steps 0
[[ -z $EVAL_REVISIONS ]] || command+=(--eval_revisions "$EVAL_REVISIONS")
add_switches DISCRIMINATOR

# Braces, because bash reads them whole: editing this file while it runs does no harm.
{ run_stage step2_discriminator has_results "${command[@]}" "$@"; exit; }
