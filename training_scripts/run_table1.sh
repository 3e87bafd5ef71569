#!/usr/bin/env bash
# Every method of the paper's Table 1, with three seeds -> OUTPUT/seed-N, one run_method.sh each.
#
# Hardware: 8 x A100 80GB with the defaults. Time: days. The labelling is paid for once and shared by all seeds.
# Launch:   bash training_scripts/run_table1.sh [OUTPUT]
#           PLAN=1 SEEDS=1 METHODS="sft dpo tlcr" bash training_scripts/run_table1.sh
#           MORE_METHODS="abc drlc rlmec fine_grained preference_grounded ppo_max": beside them, those of docs/rewards.md
# A stopped run goes on where it was when it is started again; finished stages are skipped.

set -euo pipefail
METHODS=${METHODS:-sft dpo figa ppo_synthetic ppo_seq remax tlcr_fixed tlcr}${MORE_METHODS:+ $MORE_METHODS}
SEEDS=${SEEDS:-1234 1235 1236} # of training; the split of the data has its own
root=${1:-${OUTPUT:-output/table1}}
scripts=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

if [[ ${PLAN:-0} == 1 ]]; then # what methods share is planned once
  PLANNED=$(mktemp)
  export PLANNED
  trap 'rm -f "$PLANNED"' EXIT
fi

for method in $METHODS; do # before days of training, not after
  CHECK_NAME=1 bash "$scripts/run_method.sh" "$method"
done

# Braces, because bash reads them whole: editing this file while it runs does no harm.
{
  if [[ -z ${REVISIONS:-} && $METHODS == *@(tlcr|figa|ppo_synthetic|random|rlmec|fine_grained)* ]]; then
    printf '#### labels, for all seeds\n'
    bash "$scripts/run_method.sh" labels "$root"
    export REVISIONS=$root/labeling/revisions.jsonl
  fi
  for seed in $SEEDS; do
    for method in $METHODS; do
      printf '\n#### %s, seed %s\n' "$method" "$seed"
      SEED=$seed bash "$scripts/run_method.sh" "$method" "$root/seed-$seed"
    done
  done
  exit
}
