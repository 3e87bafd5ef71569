#!/usr/bin/env bash
# Labelling (paper 4.1): LABEL_MODEL revises the rejected responses of the reward part of DATA -> OUTPUT/labeling
#
# Hardware: none, but the key of a paid API in OPENAI_API_KEY (or in the variable that API_KEY_ENV names). PLAN=1 says
# what it will cost; it stops before it could cost more than LABEL_MAX_USD, and asks no questions below that.
# Time: hours, set by the API's rate limits; a stopped run (exit status 3) goes on where it was.
# Launch:   bash training_scripts/label.sh [options of labeling/main.py]
#           LABEL_BASE_URL=http://127.0.0.1:8000/v1 bash training_scripts/label.sh     a server of your own: no key, no price
# Variables with their defaults: recipe.sh, "label.sh". Skipped when OUTPUT/labeling/run.json says complete.

# shellcheck source=training_scripts/recipe.sh
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
prepare

command=(
  python3 "${at}labeling/main.py"
  --data_path "${data[@]}"
  --data_split "$DATA_SPLIT"
  --data_seed "$DATA_SEED"
  --split train
  --max_failure_share "$LABEL_MAX_FAILURE_SHARE"
  --api_key_env "$API_KEY_ENV"
  --output_dir "$OUTPUT/labeling"
)
[[ -z $LABEL_MODEL ]] || command+=(--model "$LABEL_MODEL")
[[ $LABEL_EFFORT == lowest ]] || command+=(--reasoning_effort "$LABEL_EFFORT")
[[ -z $LABEL_PRICE ]] || command+=(--price "$LABEL_PRICE")
switch --batch "$LABEL_BATCH"
[[ -z $LABEL_MAX_USD ]] || command+=(--max_cost_usd "$LABEL_MAX_USD" --yes)
[[ -z $LABEL_TOKENIZER ]] || command+=(--tokenizer "$LABEL_TOKENIZER")
[[ -z $LABEL_BASE_URL ]] || command+=(--base_url "$LABEL_BASE_URL")

# Braces, because bash reads them whole: editing this file while it runs does no harm.
{ run_stage labeling is_labelled "${command[@]}" "$@"; exit; }
