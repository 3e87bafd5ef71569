#!/usr/bin/env bash
# Step 2 of RLMEC, a model that rewrites answers: trained from MODEL on REVISIONS -> OUTPUT/step2_grm
#
# Hardware: 8 x A100 80GB with the defaults (PLAN=1 shows what other sizes need). Time: an hour or two.
# Launch:   bash training_scripts/step2_grm.sh [options of step2_grm/main.py]
#           REVISIONS=my_revisions.jsonl bash training_scripts/step2_grm.sh
# Variables with their defaults: recipe.sh, "step2_grm.sh". Skipped when OUTPUT/step2_grm/results.json exists.

# shellcheck source=training_scripts/recipe.sh
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
prepare
read -ra revisions <<<"$REVISIONS"

command=(
  "${launcher[@]}" "${at}step2_grm/main.py" --deepspeed
  --model_name_or_path "$MODEL"
  --revisions "${revisions[@]}"
)
MAX_SEQ_LEN=$GRM_MAX_SEQ_LEN add_training GRM step2_grm --lr_scheduler_type cosine --num_warmup_steps 0
[[ -z $EVAL_REVISIONS ]] || command+=(--eval_revisions "$EVAL_REVISIONS")
add_switches GRM

# Braces, because bash reads them whole: editing this file while it runs does no harm.
{ run_stage step2_grm has_results "${command[@]}" "$@"; exit; }
