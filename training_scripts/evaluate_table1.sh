#!/usr/bin/env bash
# What run_table1.sh or run_ablations.sh has trained, evaluated seed by seed, then as mean and standard deviation.
#
# Hardware and time: as evaluate.sh, for each seed and method. MAX_COST_USD holds for each seed.
# Launch:   bash training_scripts/evaluate_table1.sh OUTPUT
#           JUDGE=gpt-6-luna MT_BENCH_DIR=FastChat OPENAI_API_KEY=… bash training_scripts/evaluate_table1.sh output/table1
# Results:  OUTPUT/seed-N/evaluation/report.html, OUTPUT/table1.json and a table. Started again it continues.
# evaluate.sh's variables hold here too; MODELS, RUNS and OUT are set for each seed by what is there.

set -euo pipefail
scripts=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=${1:?usage: bash evaluate_table1.sh OUTPUT_OF_RUN_TABLE1 [options of evaluation/main.py]}
shift

status=0
# array NAME ELEMENT…: an assignment for bash to read.
array() {
  local name=$1
  shift
  printf '%s=(' "$name"
  [[ $# == 0 ]] || printf '%q ' "$@"
  printf ')\n'
}

# Braces, because bash reads them whole: editing this file while it runs does no harm.
{
  for seed in "$root"/seed-*; do
    [[ -d $seed ]] || { printf 'error: %s has no seed-N folders: run_table1.sh makes them\n' "$root" >&2; exit 2; }
    models=() runs=() options=${RUN_OPTIONS:-}
    for folder in step1_sft dpo figa; do
      [[ ! -f $seed/$folder/results.json ]] || models+=("${folder#step1_}=$seed/$folder")
    done
    for folder in "$seed"/step3_*; do
      [[ -f $folder/results.json ]] || continue
      method=${folder##*/step3_}
      [[ $method != ppo_tlcr ]] || method=tlcr
      models+=("$method=$folder/actor") runs+=("$method=$folder") options=${options:-$folder/run_options.json}
    done
    discriminator=${DISCRIMINATOR:-} sequence=${SEQUENCE_REWARD:-} revisions=()
    [[ -n $discriminator || ! -f $seed/step2_discriminator/results.json ]] || discriminator=$seed/step2_discriminator
    [[ -n $sequence || ! -f $seed/step2_sequence/results.json ]] || sequence=$seed/step2_sequence
    [[ -n ${REVISIONS:-} || ! -f $root/labeling/revisions.jsonl ]] || revisions=("$root/labeling/revisions.jsonl")
    printf '\n#### %s: %s\n' "$seed" "${models[*]}"
    {
      array MODELS "${models[@]}"
      array RUNS "${runs[@]}"
      [[ -n ${REVISIONS:-} ]] || array REVISIONS "${revisions[@]}"
      printf 'OUT=%q DISCRIMINATOR=%q SEQUENCE_REWARD=%q ' "$seed/evaluation" "$discriminator" "$sequence"
      printf 'RUN_OPTIONS=%q\n' "$options" # says which data it was; without a run of step 3 DATA does
    } >"$seed/evaluate.conf"
    bash "$scripts/evaluate.sh" "$seed/evaluate.conf" "$@" || status=$?
    # Missing verdicts (4) are told, and the other seeds go on.
    [[ $status == 0 || $status == 4 ]] || exit "$status"
  done
  # shellcheck source=training_scripts/setup.sh
  source "$scripts/setup.sh"
  python3 "$scripts/../evaluation/table1.py" --run_dir "$root"
  exit "$status"
}
