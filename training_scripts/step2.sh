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
  --data_path "${data[@]}"
  --data_split "$DATA_SPLIT"
  --data_seed "$DATA_SEED"
  --max_seq_len "$MAX_SEQ_LEN"
  --per_device_train_batch_size "$DISCRIMINATOR_BATCH_SIZE"
  --per_device_eval_batch_size "$DISCRIMINATOR_BATCH_SIZE"
  --gradient_accumulation_steps "$DISCRIMINATOR_ACCUMULATION_STEPS"
  --num_train_epochs "$DISCRIMINATOR_EPOCHS"
  --learning_rate "$DISCRIMINATOR_LEARNING_RATE"
  --weight_decay "$DISCRIMINATOR_WEIGHT_DECAY"
  --lr_scheduler_type cosine
  --num_warmup_steps 0
  --zero_stage "$DISCRIMINATOR_ZERO_STAGE"
  --dtype "$DTYPE"
  --seed "$SEED"
  --output_dir "$OUTPUT/step2_discriminator"
)
[[ -z $EVAL_REVISIONS ]] || command+=(--eval_revisions "$EVAL_REVISIONS")
[[ $DISCRIMINATOR_TOKENS_PER_MICRO_BATCH == 0 ]] || command+=(--tokens_per_micro_batch "$DISCRIMINATOR_TOKENS_PER_MICRO_BATCH")
attend
switch --gradient_checkpointing "$DISCRIMINATOR_GRADIENT_CHECKPOINTING"
switch --offload "$DISCRIMINATOR_OFFLOAD"

# Braces, because bash reads them whole: editing this file while it runs does no harm.
{ run_stage step2_discriminator has_results "${command[@]}" "$@"; exit; }
