#!/usr/bin/env bash
# Iterated TLCR (beyond the paper, whose reward data is static): the policy answers prompts, the external model revises
# *those* answers, the discriminator learns from all labels so far, PPO goes on from the policy. ROUNDS times.
#
# Hardware: as run_7b.sh. Time: a round takes about as long as its labelling, step 2 and step 3. Each of a round's two
# labellings (training and held-out answers) stops before it could cost more than LABEL_MAX_USD; the same command, with a
# higher limit, goes on there, and after any other stop.
# Launch:   bash training_scripts/run_iterated.sh OUTPUT     OUTPUT: a run that run_7b.sh has finished
#           ROUNDS=5 ROUND_PROMPTS=5000 bash training_scripts/run_iterated.sh output/llama2-7b
# Results:  OUTPUT/roundN/step3_ppo_tlcr/actor, and OUTPUT/iterated.json: by round how the labels shift, and how well the
# discriminator judges the policy's own answers before and after it has learnt from such.
# The KL penalty of every round is against the SFT model.

# ---- variables (the environment wins) ----
set -a
OUTPUT=${1:-${OUTPUT:-output/llama2-7b}}
: "${ROUNDS:=3}" "${ROUND_PROMPTS:=2000}" "${ROUND_EVAL_PROMPTS:=200}" # prompts that are answered in a round
set +a
for number in ROUNDS ROUND_PROMPTS ROUND_EVAL_PROMPTS; do
  if [[ ! ${!number} =~ ^[1-9][0-9]*$ ]]; then
    printf 'error: %s=%s: must be a whole number above 0\n' "$number" "${!number}" >&2
    exit 2
  fi
done

# shellcheck source=training_scripts/recipe.sh
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
prepare
scripts=$project/training_scripts run=$OUTPUT
for made in step1_sft labeling step2_discriminator step3_ppo_tlcr; do
  [[ $PLAN == 1 || -d $run/$made ]] || die "$run/$made is not there: run_iterated.sh goes on from a finished run"
done
preflight

# judged NAME DISCRIMINATOR: how well it judges the answers of this round that no discriminator learns from.
judged() {
  run_stage "$1" "has discriminator/results.json" python3 "${at}evaluation/discriminator.py" --discriminator "$2" --eval_share 1 \
    --revisions "$round/held_out/labeling/revisions.jsonl" --max_seq_len "$MAX_SEQ_LEN" --out "$OUTPUT/$1" "${gpus[@]}"
}
# audited FOLDER: the statistics of its labels.
audited() {
  OUTPUT=$1 run_stage audit "has audit.json" python3 "${at}labeling/audit.py" "$1/labeling/revisions.jsonl" \
    --tokenizer "$run/step1_sft" --output_dir "$1/audit"
}

gpus=()
[[ -z $NUM_GPUS ]] || gpus=(--num_processes "$NUM_GPUS") # answers and judgements, on each GPU of this node
audited "$run"
labels=$REVISIONS actor=$run/step3_ppo_tlcr/actor judge=$run/step2_discriminator
for ((number = 1; number <= ROUNDS; number++)); do
  round=$run/round$number OUTPUT=$run/round$number

  run_stage answers has_results python3 "${at}labeling/own_answers.py" --policy "$actor" --round "$number" \
    --data_path "${data[@]}" --data_split "$DATA_SPLIT" --data_seed "$DATA_SEED" --prompts "$ROUND_PROMPTS" \
    --eval_prompts "$ROUND_EVAL_PROMPTS" --max_prompt_seq_len "$MAX_PROMPT_LEN" \
    --max_answer_seq_len "$MAX_ANSWER_LEN" --seed "$SEED" --output_dir "$OUTPUT/answers" "${gpus[@]}"
  DATA=$round/answers DATA_SPLIT=0,10,0 attended bash "$scripts/label.sh"
  OUTPUT=$round/held_out DATA=$round/answers DATA_SPLIT=0,10,0 attended bash "$scripts/label.sh" --split eval
  audited "$round"

  judged before "$judge"
  labels+=" $round/labeling/revisions.jsonl"
  REVISIONS=$labels EVAL_REVISIONS=$round/held_out/labeling/revisions.jsonl attended bash "$scripts/step2.sh"
  judge=$round/step2_discriminator
  judged after "$judge"

  SFT_MODEL=$actor REFERENCE_MODEL=$run/step1_sft DISCRIMINATOR_MODEL=$judge attended bash "$scripts/step3.sh"
  actor=$round/step3_ppo_tlcr/actor
done
if [[ $PLAN == 1 ]]; then
  printf '\nLabelling: %s rounds x 2, each at most US$ %s (LABEL_MAX_USD)\n' "$ROUNDS" "${LABEL_MAX_USD:-not limited}"
else
  python3 "${at}evaluation/iterated.py" --run_dir "$run" --rounds "$ROUNDS"
fi
