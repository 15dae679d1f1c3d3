"""A run shows what is worth seeing, and no warning about what nobody who runs a recipe can change."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TINY = Path(__file__).parent / "tiny.yaml"


NOT_REQUIRED = """
import sys
sys.modules |= dict.fromkeys(["absl", "apex", "transformer_engine", "tensorboard"])  # imports of these fail
"""


def test_a_run_without_trouble_says_nothing_on_stderr(tmp_path):
    """Nor where nothing is installed but what the package requires."""
    (tmp_path / "sitecustomize.py").write_text(NOT_REQUIRED)
    line = [sys.executable, "-m", "dsplugins", "train", str(TINY), "train.steps=1", "run.directory=out"]
    done = subprocess.run(
        line,
        **{"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(tmp_path)}},
        **{"capture_output": True, "text": True, "timeout": 180},
    )
    assert (
        done.returncode == 0
        and done.stderr.startswith("starting 1 process: ")
        and done.stderr.count("\n") == 1
    )


def test_other_warnings_are_shown():
    program = "from dsplugins.quiet import quiet; quiet(); import warnings; warnings.warn('something else')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert "something else" in done.stderr
