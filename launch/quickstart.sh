#!/usr/bin/env bash
# Sets up .venv and trains DeepSeek-V3 in miniature on two CPU processes. Arguments go to `dsplugins train`.
set -euo pipefail
# shellcheck source=launch/environment.sh
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
ensure_environment plot
cd "$ROOT"
exec "$VENV/bin/dsplugins" train recipes/deepseek_v3/tiny_cpu.yaml "$@"
