#!/usr/bin/env bash
# Runs the CUDA side on a machine with one GPU: the tests marked `gpu`, then `dsplugins experiment gpu`. They
# write docs/records/gpu_tests.json and gpu.json. Arguments go to the latter, such as `--part products`. Exit
# code 4: no GPU here; else 0 if all went well.
# DeepGEMM is installed for fp8_v3's backend of that name, the release for the newest torch;
# DSPLUGINS_GPU_EXTRAS=gpu leaves it out, for an older torch and a release that was built for that. What needs
# transformer-engine is skipped, by name, where that isn't installed.
# Without network: PIP_NO_INDEX=1 PIP_FIND_LINKS=FOLDER OF WHEELS, and DSPLUGINS_VENV=FOLDER for an environment
# that is there already, such as one made with --system-site-packages over a Python that has torch.
set -euo pipefail
# shellcheck source=launch/environment.sh
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

driver() { # whether NVIDIA's driver shows a GPU; containers may come without nvidia-smi
    nvidia-smi -L >/dev/null 2>&1 || [ -e /dev/nvidiactl ]
}

if ! driver; then
    echo "This machine has no NVIDIA GPU, or no driver for it: nothing was run." >&2
    exit 4
fi
ensure_environment "${DSPLUGINS_GPU_EXTRAS:-gpu,deepgemm}"
cd "$ROOT"
export PATH="$VENV/bin:$PATH"
if ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "There is a GPU, but the torch in $VENV can't use it: see \`dsplugins doctor\`." >&2
    exit 4
fi

failed=0
DSPLUGINS_RECORD=docs/records python -m pytest -m gpu tests/gpu tests/plugins -rs || failed=1
dsplugins experiment gpu "$@" || failed=1
exit $failed
