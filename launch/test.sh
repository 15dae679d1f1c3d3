#!/usr/bin/env bash
# Sets up .venv and runs every check that needs no GPU. Arguments go to pytest.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$ROOT/launch/environment.sh"
ensure_environment test
cd "$ROOT"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PATH="$VENV/bin:$PATH"
ruff check .
ruff format --check .
mypy
lint-imports
exec python -m pytest -rs "$@"
