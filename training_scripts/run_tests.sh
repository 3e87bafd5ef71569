#!/usr/bin/env bash
# All tests.
#
# Hardware: 2 CPU cores and 8 GB of memory; no GPU, no network once the packages are installed. Time: under 10 minutes.
# Launch:   bash training_scripts/run_tests.sh [options of pytest]

set -euo pipefail
export PACKAGES_TOO="pytest pytest-xdist"
# shellcheck source=training_scripts/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$project"
# Most tests keep one core busy, so two run side by side.
exec python3 -m pytest -n 2 --dist worksteal "$@"
