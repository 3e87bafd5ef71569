#!/usr/bin/env bash
# FIGA, a baseline: the SFT model learns what the REVISIONS added and unlearns what they removed -> OUTPUT/figa
#
# Hardware: 8 x A100 80GB with the defaults (PLAN=1 shows what other sizes need). Time: several hours.
# Launch:   bash training_scripts/figa.sh [options of baselines/figa/main.py]
# Variables with their defaults: recipe.sh, "figa.sh". Skipped when OUTPUT/figa/results.json exists.

# shellcheck source=training_scripts/recipe.sh
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
prepare
read -ra revisions <<<"$REVISIONS"

command=(
  "${launcher[@]}" "${at}baselines/figa/main.py" --deepspeed
  --model_name_or_path "$SFT_MODEL"
  --revisions "${revisions[@]}"
)
add_training FIGA figa --lr_scheduler_type constant
[[ -z $EVAL_REVISIONS ]] || command+=(--eval_revisions "$EVAL_REVISIONS")
add_switches FIGA

# Braces, because bash reads them whole: editing this file while it runs does no harm.
{ run_stage figa has_results "${command[@]}" "$@"; exit; }
