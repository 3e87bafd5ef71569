#!/usr/bin/env bash
# The study: what testbed/study/registration.json has committed to, on the testbed (docs/study.md).
#
# Hardware: 2 CPU cores, 8 GB of memory, no GPU, no network once the packages are installed.
# Time:     eight hours, in parts of at most two: each call ends after about two hours (with exit code 3 while something is
#           left), and the same call continues.
# Launch:   bash training_scripts/study.sh [OUTPUT]              four times
#           bash training_scripts/study.sh OUTPUT --until grid   no further than the settings, which are then frozen
#           bash training_scripts/study.sh OUTPUT --report       runs nothing: tables and page of what is there
#           PLAN=1 bash training_scripts/study.sh                prints the commands' names, runs nothing
# Methods, seeds, settings and rules are the registration's; no option changes them. Further options are those of
# testbed/study/main.py (--help). Nothing is made twice.

# ---- variables (the environment wins) ----
set -a
OUTPUT=${1:-${OUTPUT:-output/study}}
: "${JOBS:=2}"   # commands side by side
set +a
shift $(($# > 0))

# shellcheck source=training_scripts/recipe.sh
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
if [[ $PLAN == 1 ]]; then PLAN=0; planned=1; else planned=0; fi # the plan is the program's own, so it needs packages
prepare

command=(python3 "${at}testbed/study/main.py" --output_dir "$OUTPUT" --jobs "$JOBS")
switch --plan "$planned"
{ attended "${command[@]}" "$@"; exit; }
