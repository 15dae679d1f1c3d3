"""Fixtures of every test: `workers` and `single`, see `dsplugins.testing`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parent

pytest_plugins = ["dsplugins.testing", "gpu_record"]
LONGEST = (
    "test_resume.py",
    "test_resume_killed.py",
    "launch/test_slurm.py",
    "test_layouts.py",
    "plugins/precision/fp8/test_fp8_v3.py",
    "checkpoint/test_state.py",
    "checkpoint/test_resaved.py",
    "plugins/optimizer/test_overlap.py",
    "recipes/test_every_key.py",
    "plugins/dispatcher/test_flex.py",
    "docs/test_writing.py",
    "test_launcher.py",
    "test_ranks.py",
    "docs/test_blocks.py",
    "experiments/test_balance.py",
)
"""Files that come first, the longest before the others: no process is left with one of them at the end."""


def pytest_configure(config):
    """Hide GPUs from all but `-m gpu`, so that the CPU platform can be tested on any machine."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if config.getoption("markexpr") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items):
    """Put the longest files first. Skip, by name, what needs a GPU where none is to be seen."""
    first = {ROOT / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: first.get(item.path, len(first)))
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            # Its name, so that `-rs` has a line for each and doesn't only count them.
            reason = f"{item.name} needs a GPU: run launch/gpu.sh on a machine with one"
            item.add_marker(pytest.mark.skip(reason=reason))
