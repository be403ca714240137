#!/usr/bin/env bash
# Install what is needed into .venv, then run every check and every test. Arguments go to pytest: launch/test.sh -k plan
set -eu -o pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/venv.sh

failed=()
step() {
    echo "== $*"
    "$@" || failed+=("$*")
}

install || { echo "FAILED: installing into .venv" >&2; exit 1; }
export PATH=$PWD/.venv/bin:$PATH
# Where PYTHONDONTWRITEBYTECODE is set, each of the hundreds of processes to come would compile all this again.
python -m compileall -q loader tests launch configs
step ruff check .
step ruff format --check .
step mypy
step lint-imports
step shellcheck launch/*.sh .ci/run
step hadolint docker/Dockerfile
step launch/quickstart.sh
# A file's tests stay together, for they share servers; more workers than that only compete for ports and memory. Files
# with few tests are not left for the end: they are the long ones.
step pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder "$@"

if ((${#failed[@]})); then
    printf 'FAILED: %s\n' "${failed[@]}" >&2
    exit 1
fi
