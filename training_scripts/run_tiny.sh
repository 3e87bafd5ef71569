#!/usr/bin/env bash
# The whole of TLCR in minutes on a CPU: run_7b.sh's stages and entry points with other variables, on the testbed, a
# made-up world of preferences whose true score is known. At the end: a table, OUTPUT/results.json, OUTPUT/report.html.
#
# Hardware: 2 CPU cores, 4 GB of memory, no GPU, no network once the packages are installed. Time: under 10 minutes.
# Launch:   bash training_scripts/run_tiny.sh [OUTPUT]
#           SEED=2 bash training_scripts/run_tiny.sh
# Started again it reuses the stages that are finished.

# ---- variables: what is not as in the paper's recipe (the environment wins, as everywhere) ----
set -a
: "${SEED:=1}"
OUTPUT=${1:-${OUTPUT:-output/tiny-seed$SEED}} # another seed never meets this one's results
for name in MODEL DATA; do
  [[ -z ${!name:-} ]] || {
    echo "error: $name=${!name}: this script makes its own, the testbed's; unset $name, or use run_7b.sh" >&2 && exit 2
  }
done
MODEL=$OUTPUT/base DATA=$OUTPUT/data MADE_HERE=1 # made by this run: nothing to look for beforehand
: "${TESTBED_WORLD:=2}" # docs/testbed.md; 1: the old world
: "${TESTBED_PAIRS:=12800}" "${TESTBED_EVAL_PAIRS:=1024}" # preference pairs to train on, held-out ones
: "${TESTBED_PROMPTS:=192}"     # prompts to be tested on
: "${TESTBED_DOCUMENTS:=24000}" # what the base model reads
: "${LABEL_MODEL:=oracle-reviser}"
LABEL_BASE_URL=http://127.0.0.1:PORT/v1
: "${DTYPE:=fp32}" "${NUM_GPUS:=2}" "${MASTER_PORT:=$((20000 + RANDOM % 10000))}"
# Too few parameters for a GPU; two ranks of one thread use two cores better than one rank of two threads.
: "${DS_ACCELERATOR:=cpu}" "${OMP_NUM_THREADS:=1}"
: "${SFT_BATCH_SIZE:=16}" "${SFT_LEARNING_RATE:=1e-3}"
: "${SFT_ZERO_STAGE:=0}" "${SFT_GRADIENT_CHECKPOINTING:=0}"
: "${DISCRIMINATOR_BATCH_SIZE:=8}" "${DISCRIMINATOR_LEARNING_RATE:=1e-3}"
: "${DISCRIMINATOR_ZERO_STAGE:=0}" "${DISCRIMINATOR_GRADIENT_CHECKPOINTING:=0}"
: "${DISCRIMINATOR_TOKENS_PER_MICRO_BATCH:=0}" # prompts of a few words: nothing to save by sharing them
: "${GENERATION_BATCH_SIZE:=32}" "${PPO_BATCH_SIZE:=32}" "${MAX_PROMPT_LEN:=64}" "${MAX_ANSWER_LEN:=96}"
: "${ACTOR_LEARNING_RATE:=3e-4}" "${CRITIC_LEARNING_RATE:=1e-3}" "${WHITEN_ADVANTAGES:=1}"
: "${ACTOR_ZERO_STAGE:=0}" "${CRITIC_ZERO_STAGE:=0}" "${REFERENCE_ZERO_STAGE:=0}" "${REWARD_ZERO_STAGE:=0}"
: "${PPO_OFFLOAD:=0}" "${PPO_GRADIENT_CHECKPOINTING:=0}" "${PPO_SAVE_INTERVAL:=0}"
: "${PPO_SAVE_ANSWERS:=1}" # their true scores are a chart of the report
set +a

# shellcheck source=training_scripts/recipe.sh
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
prepare
preflight

run_stage data "has test_prompts.jsonl" python3 "${at}testbed/main.py" data --output_dir "$DATA" \
  --world "$TESTBED_WORLD" --train "$TESTBED_PAIRS" --eval "$TESTBED_EVAL_PAIRS" \
  --validation "$((TESTBED_PROMPTS / 2))" --test "$TESTBED_PROMPTS" --data_seed "$DATA_SEED"
run_stage base has_results env OMP_NUM_THREADS=2 python3 "${at}testbed/main.py" base --output_dir "$MODEL" \
  --world "$TESTBED_WORLD" \
  --documents "$TESTBED_DOCUMENTS" --seed "$SEED"

# The testbed's reviser plays GPT-4's part, behind the same kind of endpoint, for as long as this script runs.
reviser=(python3 "${at}testbed/main.py" serve --world "$TESTBED_WORLD" --model "$LABEL_MODEL" --port_file "$OUTPUT/reviser.port")
if [[ $PLAN == 1 ]]; then
  printf '\n# reviser, in the background\n' && show_command "${reviser[@]}"
elif ! is_labelled "$OUTPUT/labeling"; then
  rm -f "$OUTPUT/reviser.port"
  "${reviser[@]}" &>"$OUTPUT/reviser.log" &
  trap 'kill %1 2>/dev/null && wait %1 || true; rm -f "$OUTPUT/reviser.port"' EXIT
  until [[ -f $OUTPUT/reviser.port ]]; do
    jobs %1 &>/dev/null || { cat "$OUTPUT/reviser.log" >&2 && exit 2; }
    sleep 0.1
  done
  LABEL_BASE_URL=http://127.0.0.1:$(<"$OUTPUT/reviser.port")/v1
fi

train

# True scores of SFT and TLCR, the table and the report; again, whenever a stage was made again since.
run_stage evaluation "is_newer_than step1_sft step2_discriminator step3_ppo_tlcr" \
  python3 "${at}testbed/evaluate.py" --run_dir "$OUTPUT" --world "$TESTBED_WORLD" \
  --max_answer_seq_len "$MAX_ANSWER_LEN" --seed "$SEED"
plan
