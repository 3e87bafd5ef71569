#!/usr/bin/env bash
# Step 3, PPO with a reward for every token (paper 4.3) -> OUTPUT/PPO_FOLDER/actor and .../critic
#
# Hardware: 8 x A100 80GB with the defaults (PLAN=1 shows what other sizes need). Time: several hours.
# Launch:   bash training_scripts/step3.sh [options of step3_ppo_tlcr/main.py]
#           REWARD=tlcr_fixed bash training_scripts/step3.sh --kl_ctl 0.05
# Variables with their defaults: recipe.sh, "step3.sh". Skipped when OUTPUT/PPO_FOLDER/results.json exists.

# shellcheck source=training_scripts/recipe.sh
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
prepare
read -ra reward <<<"$REWARD"
[[ $PPO_OFFLOAD != auto ]] || PPO_OFFLOAD=$("${plan_python:-python3}" -m training_scripts.planning.plan --decide_offload)

command=(
  "${launcher[@]}" "${at}step3_ppo_tlcr/main.py" --deepspeed
  --actor_model_name_or_path "$SFT_MODEL"
  --critic_model_name_or_path "$DISCRIMINATOR_MODEL"
  --reward "${reward[@]}"
  --data_path "${data[@]}"
  --data_split "$DATA_SPLIT"
  --data_seed "$DATA_SEED"
  --max_prompt_seq_len "$MAX_PROMPT_LEN"
  --max_answer_seq_len "$MAX_ANSWER_LEN"
  --per_device_generation_batch_size "$GENERATION_BATCH_SIZE"
  --per_device_training_batch_size "$PPO_BATCH_SIZE"
  --gradient_accumulation_steps "$PPO_ACCUMULATION_STEPS"
  --num_train_epochs "$PROMPT_EPOCHS"
  --actor_learning_rate "$ACTOR_LEARNING_RATE"
  --critic_learning_rate "$CRITIC_LEARNING_RATE"
  --lr_scheduler_type cosine
  --num_warmup_steps "$PPO_WARMUP_STEPS"
  --kl_ctl "$KL_COEFFICIENT"
  --gamma "$GAMMA"
  --lam 0.95
  --actor_weight_decay "$ACTOR_WEIGHT_DECAY"
  --actor_zero_stage "$ACTOR_ZERO_STAGE"
  --critic_zero_stage "$CRITIC_ZERO_STAGE"
  --reference_zero_stage "$REFERENCE_ZERO_STAGE"
  --reward_zero_stage "$REWARD_ZERO_STAGE"
  --save_interval "$PPO_SAVE_INTERVAL"
  --dtype "$DTYPE"
  --seed "$SEED"
  --output_dir "$OUTPUT/$PPO_FOLDER"
)
[[ -z $REFERENCE_MODEL ]] || command+=(--reference_model_name_or_path "$REFERENCE_MODEL")
[[ $GENERATION_BATCHES == 1 ]] || command+=(--generation_batches "$GENERATION_BATCHES")
[[ $DECODE_BATCH_SIZE == 0 ]] || command+=(--decode_batch_size "$DECODE_BATCH_SIZE")
[[ $PPO_TOKENS_PER_MICRO_BATCH == 0 ]] || command+=(--tokens_per_micro_batch "$PPO_TOKENS_PER_MICRO_BATCH")
[[ $PPO_PRESET == none ]] || command+=(--preset "$PPO_PRESET")
if [[ $REWARD == *critic:* ]]; then # the model that labels also marks spans, and may spend as much again
  command+=(--span_api_key_env "$API_KEY_ENV")
  [[ -z $LABEL_MAX_USD ]] || command+=(--span_max_cost_usd "$LABEL_MAX_USD")
  [[ -z $LABEL_PRICE ]] || command+=(--span_price "$LABEL_PRICE")
  [[ -z $LABEL_BASE_URL ]] || command+=(--span_base_url "$LABEL_BASE_URL")
fi
if [[ $ROLLOUT == vllm ]]; then
  read -ra servers <<<"$ROLLOUT_HOSTS"
  ((${#servers[@]})) || {
    echo "error: ROLLOUT=vllm: name the servers that serve_rollouts.sh started, ROLLOUT_HOSTS=http://127.0.0.1:8000" >&2
    exit 2
  }
  command+=(--rollout vllm --vllm_server "${servers[@]}")
  [[ $ROLLOUT_AHEAD == 0 ]] || command+=(--rollout_ahead "$ROLLOUT_AHEAD")
elif [[ $ROLLOUT != loop ]]; then
  command+=(--rollout "$ROLLOUT")
fi
[[ $ALGO == ppo ]] || command+=(--algo "$ALGO")
attend
switch --actor_gradient_checkpointing "$PPO_GRADIENT_CHECKPOINTING"
switch --critic_gradient_checkpointing "$PPO_GRADIENT_CHECKPOINTING"
switch --offload "$PPO_OFFLOAD"
switch --enable_ema "$PPO_EMA"
switch --save_answers "$PPO_SAVE_ANSWERS"
switch --whiten_advantages "$WHITEN_ADVANTAGES"

# Braces, because bash reads them whole: editing this file while it runs does no harm.
{ run_stage "$PPO_FOLDER" has_results "${command[@]}" "$@"; exit; }
