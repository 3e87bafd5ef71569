#!/usr/bin/env bash
# Makes .venv with everything the project needs; a second run finds that nothing is left to do.
#
# Hardware: any. Time: 2 to 10 minutes the first time (PyTorch is most of it), half a second after.
# Launch:   bash training_scripts/setup.sh          (the other scripts source it, so nobody has to)
# An active environment (venv, conda, container) that already has the packages is used as it is, and .venv not made.
# PACKAGES_TOO names packages that are needed beside those of requirements.txt (run_tests.sh: pytest and its xdist).

set -euo pipefail

PYTHON=${PYTHON:-}   # the Python to build .venv with; empty: the first of version 3.10 to 3.12 on PATH

project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
environment=$project/.venv

die() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

version_fits() {
  "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null
}

has_packages() {
  # shellcheck disable=SC2086 # several names, or none
  version_fits "$1" &&
    PYTHONPATH=$project "$1" -m training_scripts.planning.preflight --packages_only ${PACKAGES_TOO:-} &>/dev/null
}

# The first argument that is a Python of a version the packages exist for.
find_python() {
  local candidate
  for candidate in "$@"; do
    if [[ -n $candidate ]] && version_fits "$candidate"; then
      command -v "$candidate"
      return
    fi
  done
}

# What .venv was installed from: any change here means installing again.
recipe_hash() {
  cat "$project"/{requirements.txt,constraints.txt,pyproject.toml} | sha256sum | cut -d ' ' -f 1
}

install_environment() {
  local base
  base=$(find_python "$PYTHON" python3 python3.12 python3.11 python3.10 python)
  [[ -n $base ]] || die "no Python 3.10, 3.11 or 3.12 found on PATH; install one (Debian, Ubuntu: apt install" \
    "python3 python3-venv python3-dev) or name one: PYTHON=/path/to/python3.11 bash $0"
  if ! version_fits "$environment/bin/python"; then
    "$base" -m venv --clear "$environment" ||
      die "$base cannot make virtual environments; install its venv module (Debian, Ubuntu: apt install python3-venv)"
  fi
  local constraints=(-c "$project/constraints.txt")
  if "$environment/bin/python" -c 'import sys; sys.exit(sys.version_info >= (3, 11))'; then
    echo "Python 3.10: the versions in constraints.txt need 3.11; installing the newest that fit requirements.txt"
    constraints=()
  fi
  echo "installing the packages into $environment"
  (
    cd "$project"
    "$environment/bin/python" -m pip install --disable-pip-version-check "${constraints[@]}" -e '.[dev]'
  ) || {
    # Where a script's preflight is known, it says at once what else stands in the way.
    ! declare -F preflight >/dev/null || PATH=$environment/bin:$PATH PYTHONPATH=$project preflight || true
    die "the packages cannot be installed, pip says above why; mend that (network? proxy? PIP_INDEX_URL?) or activate" \
      "an environment that has them"
  }
  recipe_hash >"$environment/.installed-from"
}

use_packages() {
  command -v "${CXX:-c++}" >/dev/null ||
    die "no C++ compiler (${CXX:-c++}): DeepSpeed compiles its operators with one at their first use;" \
      "install g++ (Debian, Ubuntu: apt install build-essential) or set CXX"
  if ! has_packages python3; then
    if [[ $(cat "$environment/.installed-from" 2>/dev/null) != "$(recipe_hash)" ]] ||
      ! version_fits "$environment/bin/python"; then
      install_environment
    fi
    PATH=$environment/bin:$PATH
    hash -r
  fi
}

if [[ ${PLAN:-0} == 1 ]]; then
  # A plan needs a Python and nothing installed; with the packages it can also count local data.
  plan_python=$(find_python "$environment/bin/python" python3 python3.12 python3.11 python3.10)
  [[ -n $plan_python ]] || die "no Python 3.10, 3.11 or 3.12 found on PATH"
else
  use_packages
fi
# The checkout that these scripts stand in is the one that runs, on every node, however the environment was made.
export PATH PYTHONPATH=$project${PYTHONPATH:+:$PYTHONPATH}
[[ ${BASH_SOURCE[0]} != "$0" ]] || echo "Python: $(command -v "${plan_python:-python3}")"
