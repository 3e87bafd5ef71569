#!/usr/bin/env bash
# The first minutes on a GPU: does everything run there? One line, pass or FAIL, for each check.
#
# Hardware: one A100, H100 or H200. Time: about 25 minutes with SIZE=full; never run on a real GPU yet.
# Launch:   bash benchmarks/gpu.sh                  (models of random weights and data are made on the spot)
#           SIZE=tiny bash benchmarks/gpu.sh        (the same commands on toy shapes)
#           SIZE=tiny PYTHON="python3 tests/pretended/gpu.py" bash benchmarks/gpu.sh   (on the pretended device)

set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
: "${SIZE:=full}" "${OUT:=output/gpu-$SIZE}" "${PYTHON:=python3}"
export PYTHONPATH=$PWD HF_HUB_OFFLINE=1
mkdir -p "$OUT"
failed=0

python3 benchmarks/gpu_inputs.py "$OUT" "$SIZE" >"$OUT/inputs.log" 2>&1 || { cat "$OUT/inputs.log"; exit 1; }

# The card, the versions and this run's lines; those of a full run are copied to benchmarks/results.
summary=$OUT/summary.txt
# shellcheck disable=SC2086 # PYTHON may be a program with an argument
$PYTHON benchmarks/gpu_inputs.py --machine >"$summary" 2>"$OUT/machine.log" || { cat "$OUT/machine.log"; exit 1; }
cat "$summary"
told() { tee -a "$summary"; }

# check NAME PROGRAM OPTIONS…: run it; passes where it ends with status 0 and has written its results.
check() {
  local name=$1 begun=$SECONDS
  shift
  # shellcheck disable=SC2086
  if $PYTHON "$@" --data_path "$OUT/data.jsonl" --data_output_path "$OUT/cache" --output_dir "$OUT/$name" --resume never \
    >"$OUT/$name.log" 2>&1 && [[ -f $OUT/$name/results.json ]]; then
    echo "pass  $name ($((SECONDS - begun)) s)  $(python3 benchmarks/gpu_inputs.py --figures "$OUT/$name")" | told
  else
    echo "FAIL  $name: $OUT/$name.log" | told
    echo "      $PYTHON $*" | told
    failed=1
  fi
}

ppo() {
  local name=$1
  shift
  check "$name" step3_ppo_tlcr/main.py --actor_model_name_or_path "$OUT/model" --critic_model_name_or_path "$OUT/disc" \
    --num_warmup_steps 0 --enable_test_mode --test_stop_step 4 --actor_gradient_checkpointing \
    --critic_gradient_checkpointing --actor_zero_stage 2 --critic_zero_stage 2 --reference_zero_stage 3 \
    --reward_zero_stage 3 --tokens_per_micro_batch 2048 "$@"
}

train=(--model_name_or_path "$OUT/model" --per_device_train_batch_size 4 --max_seq_len 384 --gradient_checkpointing)
check sft step1_sft/main.py "${train[@]}" --zero_stage 2
check disc step2_discriminator/main.py "${train[@]}" --objective token --revisions "$OUT/revisions.jsonl" --zero_stage 2 \
  --allow_foreign_revisions
ppo ppo
ppo ppo-offload --offload --enable_ema
ppo ppo-eager --eager_decoding
ppo ppo-padded --tokens_per_micro_batch 0
ppo ppo-fp16 --dtype fp16 --align_overflow
for rollout in hf continuous hybrid; do ppo "ppo-$rollout" --rollout "$rollout"; done
[[ $SIZE != full ]] || cp "$summary" "benchmarks/results/gpu_$(date +%F).txt"
[[ $failed == 0 ]] && echo "all passed; logs and metrics in $OUT"
exit "$failed"
