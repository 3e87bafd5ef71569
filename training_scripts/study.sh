#!/usr/bin/env bash
# The study: every method of the paper's table x seeds on the testbed, whose true score is known (docs/study.md).
#
# Hardware: 2 CPU cores, 8 GB of memory, no GPU, no network once the packages are installed.
# Time:     QUICK=1 10 minutes (two AVX2 cores, fp32). Five seeds of all methods and both tables 76 minutes, the grid of
#           Table 1's methods 30 (two cores with AVX-512 bf16, --scale dtype=bf16).
# Launch:   QUICK=1 bash training_scripts/study.sh [OUTPUT]
#           bash training_scripts/study.sh OUTPUT --stage grid          first: chooses each method's settings
#           bash training_scripts/study.sh OUTPUT                       then: the table, at those settings
#           bash training_scripts/study.sh OUTPUT --stage sensitivity   and what varies one thing at a time
#           PLAN=1 bash training_scripts/study.sh                       prints the commands' names, runs nothing
# Further options are those of testbed/study/main.py (--help). Started again it continues: nothing is made twice.

# ---- variables (the environment wins) ----
set -a
OUTPUT=${1:-${OUTPUT:-output/study}}
: "${QUICK:=0}"  # 1: one seed, four methods
: "${JOBS:=2}"   # commands side by side
set +a
shift $(($# > 0))

# shellcheck source=training_scripts/recipe.sh
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
if [[ $PLAN == 1 ]]; then PLAN=0; planned=1; else planned=0; fi # the plan is the program's own, so it needs packages
prepare

command=(python3 "${at}testbed/study/main.py" --output_dir "$OUTPUT" --jobs "$JOBS")
switch --quick "$QUICK"
switch --plan "$planned"
{ attended "${command[@]}" "$@"; exit; }
