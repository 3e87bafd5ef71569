#!/usr/bin/env bash
# Every figure and table of the paper for your own models, and one report of them: OUT/report.html.
#
# Hardware: what the models need to answer, one device; a CPU for small ones. Time: mostly the models' answers.
# Launch:   bash training_scripts/evaluate.sh RUN        RUN: the OUTPUT folder of run_tiny.sh or run_7b.sh
#           bash training_scripts/evaluate.sh CONFIG     CONFIG: a file that sets variables from the list below
#           JUDGE=gpt-4 MT_BENCH_DIR=FastChat OPENAI_API_KEY=… bash training_scripts/evaluate.sh RUN
# Further arguments go to evaluation/main.py (see its --help). Started again it continues. docs/evaluation.md explains.

set -euo pipefail
scripts=$(dirname "${BASH_SOURCE[0]}")

config=${1:-}
[[ $# == 0 ]] || shift
if [[ -d $config ]]; then
  run=${config%/}
  : "${MODELS:=sft=$run/step1_sft tlcr=$run/step3_ppo_tlcr/actor}" "${RUNS:=tlcr=$run/step3_ppo_tlcr}"
  : "${DISCRIMINATOR:=$run/step2_discriminator}" "${REVISIONS:=$run/labeling/revisions.jsonl}"
  : "${RUN_OPTIONS:=$run/step3_ppo_tlcr/run_options.json}" "${OUT:=$run/evaluation}"
elif [[ -f $config ]]; then
  # shellcheck source=/dev/null
  source "$config"
else
  echo "usage: bash $0 RUN_FOLDER | CONFIG_FILE [options of evaluation/main.py]" >&2
  exit 2
fi

# ---- variables (lists are separated by spaces) ----
MODELS=${MODELS:-}                   # NAME=FOLDER of each model
DISCRIMINATOR=${DISCRIMINATOR:-}     # the token discriminator
SEQUENCE_REWARD=${SEQUENCE_REWARD:-} # a sequence reward model
REVISIONS=${REVISIONS:-}             # revisions.jsonl files; EVAL_SHARE of their prompts was held out by step 2
EVAL_SHARE=${EVAL_SHARE:-0.05}
ERROR_SPANS=${ERROR_SPANS:-}         # QA-feedback file with people's error spans
RUNS=${RUNS:-}                       # NAME=FOLDER of each run whose metrics.jsonl is drawn
DATA=${DATA:-}                       # preference data, for its held-out prompts
DATA_SPLIT=${DATA_SPLIT:-2,4,4} DATA_SEED=${DATA_SEED:-1234}
RUN_OPTIONS=${RUN_OPTIONS:-}         # where DATA is unset: step 3's run_options.json, which names it
PROMPTS=${PROMPTS:-}                 # AlpacaEval's instructions, or your own
MT_BENCH_DIR=${MT_BENCH_DIR:-}       # a checkout of FastChat, or its llm_judge/data
JUDGE=${JUDGE:-}                     # the judging model; unset: nothing is judged, nothing is paid
JUDGE_BASE_URL=${JUDGE_BASE_URL:-}   # its address; unset: OpenAI
MAX_COST_USD=${MAX_COST_USD:-}       # most US$ for all judged parts together
OUT=${OUT:-output/evaluation}

# shellcheck source=training_scripts/setup.sh
source "$scripts/setup.sh"

if [[ -z $DATA && -f $RUN_OPTIONS ]]; then
  read -r DATA_SPLIT DATA_SEED DATA < <(python3 -c 'import json, sys
saved = json.load(open(sys.argv[1]))
print(saved["data_split"], saved["data_seed"], *saved["data_path"])' "$RUN_OPTIONS")
fi

arguments=(--out "$OUT" --eval_share "$EVAL_SHARE" --data_split "$DATA_SPLIT" --data_seed "$DATA_SEED")
# Adds "--flag value …" where there is a value; lists are meant to split.
add() {
  # shellcheck disable=SC2206
  [[ -z $2 ]] || arguments+=("--$1" $2)
}
add models "$MODELS"
add discriminator "$DISCRIMINATOR"
add sequence_reward "$SEQUENCE_REWARD"
add revisions "$REVISIONS"
add error_spans "$ERROR_SPANS"
add runs "$RUNS"
add data_path "$DATA"
add prompts "$PROMPTS"
add mt_bench_dir "$MT_BENCH_DIR"
add judge "$JUDGE"
add base_url "$JUDGE_BASE_URL"
add max_cost_usd "$MAX_COST_USD"
exec python3 "$project/evaluation/main.py" "${arguments[@]}" "$@"
