#!/usr/bin/env bash
# TLCR on a real language model and people's own edits: SmolLM2-135M learns to write as the toxic half of ParaDetox does,
# and unlearns it by a discriminator of people's minimal rewrites. Judged by models that had no part in it.
# docs/detox.md has the measures.
#
# Hardware: 2 CPU cores, 12 GB of memory, no GPU; on a GPU: DS_ACCELERATOR=cuda NUM_GPUS=1 DTYPE=bf16. No model hub needed.
# Launch:   bash training_scripts/run_detox.sh [OUTPUT] [--methods tlcr dpo …]
#           SEED=2 bash training_scripts/run_detox.sh
#           MODEL=/models/other bash training_scripts/run_detox.sh          any other base model
#           LORA_DIM=16 bash training_scripts/run_detox.sh                  SFT and PPO by LoRA
# Started again it reuses the stages that are finished.

# ---- variables: what is not as in the paper's recipe (the environment wins, as everywhere) ----
set -a
: "${PARADETOX:=../shared/data/paradetox.jsonl.gz}" # records {"toxic": text, "neutral": [texts]}, one JSON a line
: "${METHODS:=tlcr}" # sft_rewrites dpo figa ppo_seq tlcr_fixed tlcr unigram random
: "${SEED:=1}"
if [[ ${1:-} != --methods && -n ${1:-} ]]; then
  OUTPUT=$1
  shift
fi
: "${OUTPUT:=output/detox-seed$SEED}"
if [[ ${1:-} == --methods ]]; then
  shift
  METHODS=$*
fi
fetched=${MODEL:+0}
: "${MODEL:=$OUTPUT/base}"
DATA=$OUTPUT/data/train/pairs MADE_HERE=1 # made by this run: nothing to look for beforehand
REVISIONS=$OUTPUT/data/train/revisions.jsonl EVAL_REVISIONS=$OUTPUT/data/validation/revisions.jsonl
export DETOX_DATA=$OUTPUT/data # where the reward "unigram" finds its words
: "${TEST_SHARE:=0.12}" "${TEST_PROMPTS:=600}" "${LORA_DIM:=0}"
: "${CHECK:=1}" # 0: PPO goes on although the discriminator knows no more than a bag of words
: "${DTYPE:=fp32}" "${NUM_GPUS:=2}" "${MASTER_PORT:=$((20000 + RANDOM % 10000))}"
: "${DS_ACCELERATOR:=cpu}" "${OMP_NUM_THREADS:=1}"
: "${MAX_SEQ_LEN:=64}" "${MAX_PROMPT_LEN:=24}" "${MAX_ANSWER_LEN:=32}"
: "${SFT_BATCH_SIZE:=8}" "${SFT_LEARNING_RATE:=1e-4}" "${SFT_ZERO_STAGE:=0}" "${SFT_GRADIENT_CHECKPOINTING:=0}"
: "${DISCRIMINATOR_BATCH_SIZE:=8}" "${DISCRIMINATOR_LEARNING_RATE:=1e-4}" "${DISCRIMINATOR_ZERO_STAGE:=0}"
: "${DISCRIMINATOR_GRADIENT_CHECKPOINTING:=0}" "${DISCRIMINATOR_TOKENS_PER_MICRO_BATCH:=256}"
: "${SEQUENCE_BATCH_SIZE:=8}" "${SEQUENCE_LEARNING_RATE:=1e-4}" "${SEQUENCE_ZERO_STAGE:=0}"
: "${SEQUENCE_GRADIENT_CHECKPOINTING:=0}" "${SEQUENCE_TOKENS_PER_MICRO_BATCH:=256}"
: "${DPO_BATCH_SIZE:=8}" "${DPO_LEARNING_RATE:=2e-5}" "${DPO_ZERO_STAGE:=0}" "${DPO_OFFLOAD:=0}"
: "${DPO_GRADIENT_CHECKPOINTING:=0}"
: "${FIGA_BATCH_SIZE:=8}" "${FIGA_ACCUMULATION_STEPS:=1}" "${FIGA_EPOCHS:=2}" "${FIGA_LEARNING_RATE:=5e-5}"
: "${FIGA_ZERO_STAGE:=0}" "${FIGA_GRADIENT_CHECKPOINTING:=0}"
: "${GENERATION_BATCH_SIZE:=32}" "${PPO_BATCH_SIZE:=32}" "${PPO_TOKENS_PER_MICRO_BATCH:=512}"
: "${ACTOR_LEARNING_RATE:=2e-5}" "${CRITIC_LEARNING_RATE:=1e-4}" "${KL_COEFFICIENT:=0.05}" "${WHITEN_ADVANTAGES:=1}"
: "${ACTOR_ZERO_STAGE:=0}" "${CRITIC_ZERO_STAGE:=0}" "${REFERENCE_ZERO_STAGE:=0}" "${REWARD_ZERO_STAGE:=0}"
: "${PPO_OFFLOAD:=0}" "${PPO_GRADIENT_CHECKPOINTING:=0}" "${PPO_SAVE_INTERVAL:=20}"
set +a

# shellcheck source=training_scripts/recipe.sh
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
prepare
[[ $PLAN == 1 || -f $PARADETOX ]] || die "PARADETOX=$PARADETOX: no such file; it is a .jsonl or .jsonl.gz of" \
  "ParaDetox's records, toxic (a text) and neutral (a list of texts)"
for method in $METHODS; do
  case $method in
    sft_rewrites | dpo | figa | ppo_seq | tlcr_fixed | tlcr | unigram | random) ;;
    *) die "METHODS: \"$method\" is none of sft_rewrites dpo figa ppo_seq tlcr_fixed tlcr unigram random" ;;
  esac
done
if [[ $PLAN != 1 ]]; then
  python3 -c 'import profanity_check, gguf' 2>/dev/null ||
    python3 -m pip install --quiet --disable-pip-version-check -c "$project/constraints.txt" -e "${project}[detox]" ||
    die "the packages of the detox example could not be installed: pip install -e '.[detox]'"
fi
preflight

is_model() {
  [[ -f $1/config.json ]]
}
is_prepared() {
  [[ -f $1/results.json ]]
}
detox=evaluation/detox/main.py scripts=$project/training_scripts data_folder=$OUTPUT/data
[[ $fetched == 0 ]] || run_stage base is_model python3 "$at$detox" fetch --output_dir "$OUTPUT/base"
run_stage data is_prepared python3 "$at$detox" prepare --paradetox "$PARADETOX" --test_share "$TEST_SHARE" \
  --output_dir "$data_folder"

lora=() ppo_lora=()
if ((LORA_DIM > 0)); then
  lora=(--lora_dim "$LORA_DIM" --lora_alpha "$((2 * LORA_DIM))" --only_optimize_lora)
  ppo_lora=(--actor_lora_dim "$LORA_DIM" --actor_lora_alpha "$((2 * LORA_DIM))" --only_optimize_lora
    --critic_lora_dim "$LORA_DIM" --critic_lora_alpha "$((2 * LORA_DIM))")
fi

# A policy with something to unlearn; the reward and, on the other half of the edits, one of the judges.
DATA=$data_folder/train/toxic DATA_SPLIT=10,0,0 attended bash "$scripts/step1.sh" "${lora[@]}"
DATA_SPLIT=0,10,0 attended bash "$scripts/step2.sh"
go_on=()
[[ $CHECK == 1 ]] || go_on=(--go_on)
run_stage check has_results python3 "$at$detox" check --data_dir "$data_folder" \
  --discriminator "$OUTPUT/step2_discriminator" --output_dir "$OUTPUT/check" --dtype "$DTYPE" "${go_on[@]}"
DATA=$data_folder/judge/pairs REVISIONS=$data_folder/judge/revisions.jsonl OUTPUT=$OUTPUT/judge DATA_SPLIT=0,10,0 \
  attended bash "$scripts/step2.sh"

# Every method from the same SFT model, on the same prompts and edits.
sft=$OUTPUT/step1_sft
models=("sft=$sft")
for method in $METHODS; do
  case $method in
    sft_rewrites)
      DATA=$data_folder/train/rewrites OUTPUT=$OUTPUT/sft_rewrites MODEL=$sft DATA_SPLIT=10,0,0 \
        attended bash "$scripts/step1.sh" "${lora[@]}"
      models+=("$method=$OUTPUT/sft_rewrites/step1_sft")
      continue
      ;;
    dpo | figa)
      DATA_SPLIT=0,10,0 attended bash "$scripts/$method.sh"
      models+=("$method=$OUTPUT/$method")
      continue
      ;;
    ppo_seq)
      DATA_SPLIT=0,10,0 attended bash "$scripts/step2_sequence.sh"
      export REWARD=sequence DISCRIMINATOR_MODEL=$OUTPUT/$SEQUENCE_FOLDER
      ;;
    unigram)
      export REWARD=python:evaluation.detox.unigram:reward DISCRIMINATOR_MODEL=$OUTPUT/step2_discriminator
      ;;
    *)
      export REWARD=$method DISCRIMINATOR_MODEL=$OUTPUT/step2_discriminator
      ;;
  esac
  [[ $method == tlcr ]] && folder=step3_ppo_tlcr || folder=step3_$method
  PPO_FOLDER=$folder DATA_SPLIT=0,0,10 attended bash "$scripts/step3.sh" "${ppo_lora[@]}"
  models+=("$method=$OUTPUT/$folder/actor")
done

# What it brought, on prompts that nobody trained on; again, whenever a policy was made again since.
is_reported() {
  local model
  for model in "${models[@]}"; do
    [[ $OUTPUT/report/results.json -nt ${model#*=}/config.json ]] || return 1
  done
}
run_stage report is_reported python3 "$at$detox" report --models "${models[@]}" --data_dir "$data_folder" \
  --base "$MODEL" --discriminator "$OUTPUT/step2_discriminator" --judge "$OUTPUT/judge/step2_discriminator" \
  --prompts "$TEST_PROMPTS" --max_new_tokens "$MAX_ANSWER_LEN" --dtype "$DTYPE" --seed "$SEED" --out "$OUTPUT/report"
