#!/usr/bin/env bash
# One method of the paper's Table 1 or of its ablations, from data to policy, by name. docs/methods.md says which of
# its settings are the paper's and which come from elsewhere.
#
# Hardware: 8 x A100 80GB with the defaults. Time: from an hour (sft) to most of a day (tlcr).
# Launch:   bash training_scripts/run_method.sh METHOD [OUTPUT]
#           PLAN=1 bash training_scripts/run_method.sh dpo
# METHOD:   sft dpo figa ppo_synthetic ppo_seq remax tlcr_fixed tlcr
#           tlcr_positive_only tlcr_negative_only tlcr_released_code random; labels: the external model's work alone
#           abc drlc rlmec fine_grained preference_grounded ppo_max: docs/rewards.md
# Methods that share OUTPUT share their stages (SFT, labelling, reward models): what is finished is not made again.

METHOD=${1:?which method? sft dpo figa ppo_synthetic ppo_seq remax tlcr_fixed tlcr tlcr_positive_only ...}
export OUTPUT=${2:-${OUTPUT:-output/llama2-7b}}
set -a
case $METHOD in
  labels) STAGES="label" ;;
  sft) STAGES="step1" ;;
  dpo) STAGES="step1 dpo" ;;
  figa) STAGES="step1 label figa" ;;
  ppo_seq)
    STAGES="step1 step2_sequence step3"
    REWARD=sequence DISCRIMINATOR_MODEL=$OUTPUT/step2_sequence
    ;;
  ppo_synthetic) # its reward model learns from (modified, rejected) pairs
    STAGES="step1 label step2_sequence step3"
    SEQUENCE_PAIRS=modified SEQUENCE_FOLDER=step2_synthetic
    REWARD=sequence DISCRIMINATOR_MODEL=$OUTPUT/step2_synthetic
    ;;
  remax)
    STAGES="step1 step2_sequence step3"
    ALGO=remax REWARD=sequence DISCRIMINATOR_MODEL=$OUTPUT/step2_sequence
    : "${GAMMA:=0.99}" "${ACTOR_WEIGHT_DECAY:=0.1}"
    ;;
  abc)
    STAGES="step1 step2_sequence step3"
    REWARD=abc DISCRIMINATOR_MODEL=$OUTPUT/step2_sequence
    ;;
  drlc) # LABEL_MODEL, at LABEL_BASE_URL, marks spans of every answer while the policy learns
    STAGES="step1 step2_sequence step3"
    [[ -z ${LABEL_BASE_URL:-} || -n ${LABEL_MODEL:-} ]] || { printf 'error: drlc: name LABEL_MODEL\n' >&2; exit 2; }
    REWARD="sequence critic:${LABEL_MODEL:-gpt-6-luna}" DISCRIMINATOR_MODEL=$OUTPUT/step2_sequence
    ;;
  rlmec) # right answers are those with a score above 0
    STAGES="step1 label step2_grm step2_sequence step3"
    REWARD="rlmec:$OUTPUT/step2_grm" DISCRIMINATOR_MODEL=$OUTPUT/step2_sequence
    ;;
  fine_grained) # TLCR's discriminator in the place of the authors' two classifiers of segments, with their weights
    STAGES="step1 label step2 step2_sequence step3"
    judge=${DISCRIMINATOR_MODEL:-$OUTPUT/step2_discriminator} whole=${SEQUENCE_MODEL:-$OUTPUT/step2_sequence}
    REWARD="segments:$judge@0.3 sentences:$judge@0.5 sequence:$whole@0.3"
    ;;
  preference_grounded)
    STAGES="step1 step2_sequence step3"
    SEQUENCE_OBJECTIVE=token_pairs SEQUENCE_FOLDER=step2_token_pairs
    REWARD=token_scores DISCRIMINATOR_MODEL=$OUTPUT/step2_token_pairs
    ;;
  ppo_max)
    STAGES="step1 step2_sequence step3"
    REWARD=sequence DISCRIMINATOR_MODEL=$OUTPUT/step2_sequence PPO_PRESET=ppo_max
    : "${ACTOR_LEARNING_RATE:=5e-7}" "${CRITIC_LEARNING_RATE:=1.5e-6}" "${KL_COEFFICIENT:=0.01}" "${PPO_WARMUP_STEPS:=100}"
    ;;
  tlcr | tlcr_fixed | tlcr_positive_only | tlcr_negative_only | tlcr_released_code | random)
    STAGES="step1 label step2 step3"
    REWARD=$METHOD
    ;;
  *)
    printf 'error: there is no method "%s"; known: sft dpo figa ppo_synthetic ppo_seq remax tlcr_fixed tlcr' "$METHOD" >&2
    printf ' tlcr_positive_only tlcr_negative_only tlcr_released_code random abc drlc rlmec fine_grained' >&2
    printf ' preference_grounded ppo_max\n' >&2
    exit 2
    ;;
esac
if [[ -n ${SEQUENCE_MODEL:-} && $STAGES == *step2_sequence* && $METHOD != preference_grounded ]]; then
  STAGES=${STAGES/ step2_sequence/}
  [[ $METHOD == fine_grained ]] || DISCRIMINATOR_MODEL=$SEQUENCE_MODEL
fi
[[ ${CHECK_NAME:-0} == 0 ]] || exit 0
[[ $METHOD == tlcr ]] || PPO_FOLDER=step3_$METHOD
set +a

# shellcheck source=training_scripts/recipe.sh
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
# Braces, because bash reads them whole: editing this file while it runs does no harm.
{
  prepare
  preflight
  without_planned
  train
  plan
  exit
}
