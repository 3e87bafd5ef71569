#!/usr/bin/env bash
# TLCR on corrections by people: the stages of run_7b.sh on 300 questions whose answers, by a model, people corrected as
# little as possible (QA-feedback). They play the external model's part, so there is nothing to pay and the labels can
# be held against the error spans that the same people marked. docs/qa_feedback.md has the numbers.
#
# Hardware: 2 CPU cores, 4 GB of memory, no GPU, no network once the packages are installed. Time: about 6 minutes.
# Launch:   bash training_scripts/run_qa_feedback.sh [OUTPUT]
#           QA_FEEDBACK=dev_feedback.jsonl SEED=2 bash training_scripts/run_qa_feedback.sh
#           PASSAGES=2 MAX_PROMPT_LEN=256 bash training_scripts/run_qa_feedback.sh    passages before the question
#           MORE_METHODS="ppo_seq tlcr_fixed" bash training_scripts/run_qa_feedback.sh    beside TLCR, from the same models
# Started again it reuses the stages that are finished.

# ---- variables: what is not as in the paper's recipe (the environment wins, as everywhere) ----
set -a
: "${QA_FEEDBACK:=../shared/data/qa_feedback_dev.jsonl.gz}" # FineGrainedRLHF's records, one JSON a line
: "${PASSAGES:=0}" # how many of a question's passages stand before it in the prompt
: "${SEED:=1}"
: "${MORE_METHODS:=}" # besides TLCR: ppo_seq tlcr_fixed tlcr_positive_only tlcr_negative_only tlcr_released_code random
OUTPUT=${1:-${OUTPUT:-output/qa-feedback-seed$SEED}}
for name in MODEL DATA REVISIONS EVAL_REVISIONS; do
  [[ -z ${!name:-} ]] || {
    echo "error: $name=${!name}: this script makes its own from QA_FEEDBACK; unset $name, or use run_7b.sh" >&2 && exit 2
  }
done
MODEL=$OUTPUT/base/step1_sft DATA=$OUTPUT/prepared/pairs MADE_HERE=1 # made by this run: nothing to look for beforehand
REVISIONS=$OUTPUT/prepared/revisions/train.jsonl EVAL_REVISIONS=$OUTPUT/prepared/revisions/eval.jsonl
: "${VOCABULARY:=4096}" "${HIDDEN_SIZE:=128}" "${LAYERS:=2}" # the tokenizer and the Llama that are made on the spot
: "${BASE_BATCH_SIZE:=4}" "${BASE_EPOCHS:=2}" "${BASE_LEARNING_RATE:=3e-3}"
: "${HELD_OUT_SHARE:=0.2}" "${ANSWERS:=4}" # prompts to be tested on, sampled answers to each
: "${DTYPE:=fp32}" "${NUM_GPUS:=1}" "${MASTER_PORT:=$((20000 + RANDOM % 10000))}"
# Too few parameters for a GPU, or for two threads, which would mostly wait for each other.
: "${DS_ACCELERATOR:=cpu}" "${OMP_NUM_THREADS:=1}"
: "${SFT_BATCH_SIZE:=8}" "${SFT_LEARNING_RATE:=1e-3}" "${SFT_ZERO_STAGE:=0}" "${SFT_GRADIENT_CHECKPOINTING:=0}"
: "${DISCRIMINATOR_BATCH_SIZE:=8}" "${DISCRIMINATOR_EPOCHS:=4}" "${DISCRIMINATOR_LEARNING_RATE:=2e-3}"
: "${DISCRIMINATOR_ZERO_STAGE:=0}" "${DISCRIMINATOR_GRADIENT_CHECKPOINTING:=0}"
: "${SEQUENCE_BATCH_SIZE:=8}" "${SEQUENCE_EPOCHS:=4}" "${SEQUENCE_LEARNING_RATE:=2e-3}"
: "${SEQUENCE_ZERO_STAGE:=0}" "${SEQUENCE_GRADIENT_CHECKPOINTING:=0}"
: "${GENERATION_BATCH_SIZE:=16}" "${PPO_BATCH_SIZE:=16}" "${PROMPT_EPOCHS:=2}"
: "${MAX_PROMPT_LEN:=64}" "${MAX_ANSWER_LEN:=128}"
: "${ACTOR_LEARNING_RATE:=3e-4}" "${CRITIC_LEARNING_RATE:=3e-4}"
: "${ACTOR_ZERO_STAGE:=0}" "${CRITIC_ZERO_STAGE:=0}" "${REFERENCE_ZERO_STAGE:=0}" "${REWARD_ZERO_STAGE:=0}"
: "${PPO_OFFLOAD:=0}" "${PPO_GRADIENT_CHECKPOINTING:=0}" "${PPO_SAVE_INTERVAL:=0}"
set +a

# shellcheck source=training_scripts/recipe.sh
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
prepare
[[ $PLAN == 1 || -f $QA_FEEDBACK ]] || die "QA_FEEDBACK=$QA_FEEDBACK: no such file; it is a .jsonl or .jsonl.gz of" \
  "QA-feedback's records (question, passages, prediction, others, gold, corrected, errors)"
for method in $MORE_METHODS; do
  case $method in
    ppo_seq | tlcr_fixed | tlcr_positive_only | tlcr_negative_only | tlcr_released_code | random) ;;
    *) die "MORE_METHODS: \"$method\" is none of ppo_seq tlcr_fixed tlcr_positive_only tlcr_negative_only" \
      "tlcr_released_code random" ;;
  esac
done
preflight

# People's corrections as revisions; then data, tokenizer and an untrained Llama, with a fifth of the prompts held out.
run_stage labeling is_labelled python3 "${at}labeling/main.py" --from "$QA_FEEDBACK" --passages "$PASSAGES" \
  --output_dir "$OUTPUT/labeling"
run_stage prepared has_results python3 "${at}evaluation/qa_feedback.py" prepare --qa_feedback "$QA_FEEDBACK" \
  --revisions "$OUTPUT/labeling/revisions.jsonl" --passages "$PASSAGES" --output_dir "$OUTPUT/prepared" \
  --held_out_share "$HELD_OUT_SHARE" \
  --vocabulary "$VOCABULARY" --hidden_size "$HIDDEN_SIZE" --layers "$LAYERS" \
  --max_positions "$MAX_SEQ_LEN" --seed "$SEED"

# Labels against the error spans that people marked.
run_stage audit "has audit.json" python3 "${at}labeling/audit.py" "$OUTPUT/labeling/revisions.jsonl" \
  --tokenizer "$OUTPUT/prepared/model" --error_spans "$QA_FEEDBACK" --output_dir "$OUTPUT/audit"

# There are too few questions to share out: every stage trains on all that are not held out. The base model first, on
# whole texts: it takes what Llama-2 would bring along.
scripts=$project/training_scripts
prepared=$OUTPUT/prepared base=$OUTPUT/base
DATA_SPLIT=10,0,0 MODEL=$prepared/model DATA=$prepared/texts OUTPUT=$base \
  SFT_EPOCHS=$BASE_EPOCHS SFT_BATCH_SIZE=$BASE_BATCH_SIZE SFT_LEARNING_RATE=$BASE_LEARNING_RATE \
  attended bash "$scripts/step1.sh" --loss_on_prompt
DATA_SPLIT=10,0,0 attended bash "$scripts/step1.sh"
DATA_SPLIT=0,10,0 attended bash "$scripts/step2.sh"
DATA_SPLIT=0,0,10 attended bash "$scripts/step3.sh"

# The same PPO with other rewards; ppo_seq's is a Bradley-Terry model of (reference answer, the model's answer).
for method in $MORE_METHODS; do
  if [[ $method == ppo_seq ]]; then
    DATA_SPLIT=0,10,0 attended bash "$scripts/step2_sequence.sh"
    export REWARD=sequence DISCRIMINATOR_MODEL=$OUTPUT/$SEQUENCE_FOLDER
  else
    export REWARD=$method DISCRIMINATOR_MODEL=$OUTPUT/step2_discriminator
  fi
  PPO_FOLDER=step3_$method DATA_SPLIT=0,0,10 attended bash "$scripts/step3.sh"
done

# What it brought, on the held-out prompts; again, whenever a stage was made again since.
read -ra more <<<"$MORE_METHODS"
run_stage report "is_newer_than step1_sft step2_discriminator step3_ppo_tlcr ${more[*]/#/step3_}" \
  python3 "${at}evaluation/qa_feedback.py" report --run_dir "$OUTPUT" \
  --answers "$ANSWERS" --max_answer_seq_len "$MAX_ANSWER_LEN" --seed "$SEED" ${more[@]:+--more_methods "${more[@]}"}
