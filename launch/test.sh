#!/usr/bin/env bash
# Sets up .venv and runs every check that needs no GPU. Arguments go to pytest.
set -euo pipefail
# shellcheck source=launch/environment.sh
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
ensure_environment test
cd "$ROOT"
export PATH="$VENV/bin:$PATH"
# Several test processes share the machine: more threads in each make all of them slower.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

run() {
    local began=$SECONDS
    echo "== $*"
    "$@"
    echo "== $1: $((SECONDS - began)) s"
}

run ruff check .
run ruff format --check .
run mypy
run lint-imports
# One process a core. A file's tests stay together: they share runs and worker processes.
run python -m pytest -rs -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder "$@"
