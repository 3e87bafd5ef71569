#!/usr/bin/env bash
# Every figure and table of the paper for your own models, and one report of them: OUT/report.html.
#
# Hardware: what one model needs to answer, one device, or several that share the prompts; a CPU for small models.
# Time: mostly the models' answers.
# Launch:   bash training_scripts/evaluate.sh RUN        RUN: the OUTPUT folder of run_tiny.sh or run_7b.sh
#           bash training_scripts/evaluate.sh CONFIG     CONFIG: a file that sets variables from the list below
#           JUDGE=gpt-6-luna MT_BENCH_DIR=FastChat OPENAI_API_KEY=… bash training_scripts/evaluate.sh RUN
# Further arguments go to evaluation/main.py (see its --help). Started again it continues. docs/evaluation.md explains.

set -euo pipefail
scripts=$(dirname "${BASH_SOURCE[0]}")

config=${1:-}
[[ $# == 0 ]] || shift
[[ $config == */* || -z $config ]] || config=./$config # neither an option nor looked for on PATH
if [[ -d $config ]]; then
  run=${config%/}
  [[ -n ${MODELS:-} ]] || MODELS=("sft=$run/step1_sft" "tlcr=$run/step3_ppo_tlcr/actor")
  [[ -n ${RUNS:-} ]] || RUNS=("tlcr=$run/step3_ppo_tlcr")
  [[ -n ${REVISIONS:-} ]] || REVISIONS=("$run/labeling/revisions.jsonl")
  : "${DISCRIMINATOR:=$run/step2_discriminator}"
  : "${RUN_OPTIONS:=$run/step3_ppo_tlcr/run_options.json}" "${OUT:=$run/evaluation}"
elif [[ -f $config ]]; then
  # shellcheck source=/dev/null
  source "$config"
else
  echo "usage: bash $0 RUN_FOLDER | CONFIG_FILE [options of evaluation/main.py]" >&2
  exit 2
fi

# ---- variables (a list is separated by blanks, or in CONFIG an array, whose elements may have blanks) ----
: "${MODELS:=}"                      # list: NAME=FOLDER of each model
DISCRIMINATOR=${DISCRIMINATOR:-}     # the token discriminator
SEQUENCE_REWARD=${SEQUENCE_REWARD:-} # a sequence reward model
: "${REVISIONS:=}"                   # list: revisions.jsonl files; step 2 held out EVAL_SHARE of their prompts
EVAL_SHARE=${EVAL_SHARE:-0.05}
ERROR_SPANS=${ERROR_SPANS:-}         # QA-feedback file with people's error spans
: "${RUNS:=}"                        # list: NAME=FOLDER of each run whose metrics.jsonl is drawn
DATA=${DATA:-}                       # list: preference data, for its held-out prompts
DATA_SPLIT=${DATA_SPLIT:-2,4,4} DATA_SEED=${DATA_SEED:-1234}
RUN_OPTIONS=${RUN_OPTIONS:-}         # where DATA is unset: step 3's run_options.json, which names it
PROMPTS=${PROMPTS:-}                 # AlpacaEval's instructions, or your own
MT_BENCH_DIR=${MT_BENCH_DIR:-}       # a checkout of FastChat, or its llm_judge/data
JUDGE=${JUDGE:-}                     # the judging model, such as gpt-6-luna; unset: nothing is judged, nothing paid
JUDGE_BASE_URL=${JUDGE_BASE_URL:-}   # its address; unset: OpenAI
ATTENTION=${ATTENTION:-sdpa}         # what computes attention, as in recipe.sh
MAX_COST_USD=${MAX_COST_USD:-}       # most US$ for all judged parts together
NUM_GPUS=${NUM_GPUS:-}               # processes that answer and score, one per GPU; unset: all of CUDA_VISIBLE_DEVICES
OUT=${OUT:-output/evaluation}

# shellcheck source=training_scripts/setup.sh
source "$scripts/setup.sh"

arguments=("--out=$OUT" "--eval_share=$EVAL_SHARE" "--data_split=$DATA_SPLIT" "--data_seed=$DATA_SEED")
# one FLAG VALUE: adds it where there is a value, as one word, so that no value becomes an option.
one() {
  [[ -z $2 ]] || arguments+=("--$1=$2")
}
# list FLAG VARIABLE: adds the elements of an array, or the words of a string.
list() {
  local -n value=$2
  local words=()
  if [[ $(declare -p "$2") == "declare -a"* ]]; then
    words=("${value[@]}")
  else
    read -rd '' -a words <<<"$value" || true
  fi
  local word
  for word in "${words[@]}"; do
    [[ $word != -* ]] || { printf 'error: %s has "%s", which looks like an option\n' "$2" "$word" >&2 && exit 2; }
  done
  [[ -z ${words[*]} ]] || arguments+=("--$1" "${words[@]}")
}
list models MODELS
one discriminator "$DISCRIMINATOR"
one sequence_reward "$SEQUENCE_REWARD"
list revisions REVISIONS
one error_spans "$ERROR_SPANS"
list runs RUNS
list data_path DATA
[[ ! -f $RUN_OPTIONS ]] || one run_options "$RUN_OPTIONS"
one prompts "$PROMPTS"
one mt_bench_dir "$MT_BENCH_DIR"
one judge "$JUDGE"
one base_url "$JUDGE_BASE_URL"
one max_cost_usd "$MAX_COST_USD"
one num_processes "$NUM_GPUS"
[[ $ATTENTION == sdpa ]] || one attn_implementation "$ATTENTION"
exec python3 "$project/evaluation/main.py" "${arguments[@]}" "$@"
