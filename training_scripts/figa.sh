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
  --data_path "${data[@]}"
  --data_split "$DATA_SPLIT"
  --data_seed "$DATA_SEED"
  --max_seq_len "$MAX_SEQ_LEN"
  --per_device_train_batch_size "$FIGA_BATCH_SIZE"
  --per_device_eval_batch_size "$FIGA_BATCH_SIZE"
  --gradient_accumulation_steps "$FIGA_ACCUMULATION_STEPS"
  --num_train_epochs "$FIGA_EPOCHS"
  --learning_rate "$FIGA_LEARNING_RATE"
  --lr_scheduler_type constant
  --zero_stage "$FIGA_ZERO_STAGE"
  --dtype "$DTYPE"
  --seed "$SEED"
  --output_dir "$OUTPUT/figa"
)
[[ -z $EVAL_REVISIONS ]] || command+=(--eval_revisions "$EVAL_REVISIONS")
attend
switch --gradient_checkpointing "$FIGA_GRADIENT_CHECKPOINTING"
switch --offload "$FIGA_OFFLOAD"

# Braces, because bash reads them whole: editing this file while it runs does no harm.
{ run_stage figa has_results "${command[@]}" "$@"; exit; }
