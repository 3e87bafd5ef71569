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
  --data_path "${data[@]}"
  --data_split "$DATA_SPLIT"
  --data_seed "$DATA_SEED"
  --max_seq_len "$MAX_SEQ_LEN"
  --per_device_train_batch_size "$SEQUENCE_BATCH_SIZE"
  --per_device_eval_batch_size "$SEQUENCE_BATCH_SIZE"
  --gradient_accumulation_steps "$SEQUENCE_ACCUMULATION_STEPS"
  --num_train_epochs "$SEQUENCE_EPOCHS"
  --learning_rate "$SEQUENCE_LEARNING_RATE"
  --weight_decay "$SEQUENCE_WEIGHT_DECAY"
  --lr_scheduler_type cosine
  --num_warmup_steps 0
  --zero_stage "$SEQUENCE_ZERO_STAGE"
  --dtype "$DTYPE"
  --seed "$SEED"
  --output_dir "$OUTPUT/$SEQUENCE_FOLDER"
)
[[ $SEQUENCE_PAIRS != modified ]] || command+=(--revisions "${revisions[@]}")
[[ $SEQUENCE_PAIRS != modified || -z $EVAL_REVISIONS ]] || command+=(--eval_revisions "$EVAL_REVISIONS")
[[ $SEQUENCE_TOKENS_PER_MICRO_BATCH == 0 ]] || command+=(--tokens_per_micro_batch "$SEQUENCE_TOKENS_PER_MICRO_BATCH")
attend
switch --gradient_checkpointing "$SEQUENCE_GRADIENT_CHECKPOINTING"
switch --offload "$SEQUENCE_OFFLOAD"

# Braces, because bash reads them whole: editing this file while it runs does no harm.
{ run_stage "$SEQUENCE_FOLDER" has_results "${command[@]}" "$@"; exit; }
