"""Fixtures of every test: `workers` and `single`, see `dsplugins.testing`."""

from __future__ import annotations

import os

import pytest

pytest_plugins = ["dsplugins.testing"]


def pytest_configure(config):
    """Hide GPUs from all but `-m gpu`, so that the CPU platform can be tested on any machine."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if config.getoption("markexpr") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items):
    """Skip, by name, what needs a GPU where none is to be seen."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            # Its name, so that `-rs` has a line for each and doesn't only count them.
            reason = f"{item.name} needs a GPU: run launch/gpu.sh on a machine with one"
            item.add_marker(pytest.mark.skip(reason=reason))
