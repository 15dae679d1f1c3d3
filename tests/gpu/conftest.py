"""A world of one GPU for the tests that are marked `gpu`; the others here run on the CPU platform."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest

RECORD = "DSPLUGINS_RECORD"
"""A folder for gpu_tests.json: what became of each test that is marked `gpu`, and why one was skipped."""
OUTCOMES = pytest.StashKey[dict[str, str]]()


def pytest_configure(config):
    config.stash[OUTCOMES] = {}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if item.get_closest_marker("gpu") and (report.when == "call" or report.outcome != "passed"):
        why = report.longrepr[2].replace("Skipped", "", 1) if report.skipped else ""
        item.config.stash[OUTCOMES][item.nodeid] = report.outcome + why
    return report


def pytest_sessionfinish(session):
    from dsplugins import records

    outcomes = session.config.stash[OUTCOMES]
    if outcomes and (folder := os.environ.get(RECORD)):
        command = [
            f"{RECORD}={folder} python -m pytest",
            *map(shlex.quote, session.config.invocation_params.args),
        ]
        found = {"holds": "failed" not in outcomes.values(), "tests": outcomes}
        records.write(Path(folder), "gpu_tests", command, found)


@pytest.fixture(scope="session")
def nccl():
    """This process as an NCCL world of its own; gives the device."""
    # cuBLAS repeats itself only with a workspace of fixed size, which it asks for when it starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import torch
    import torch.distributed as dist

    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield device
    dist.destroy_process_group()


@pytest.fixture
def deterministic():
    """Torch's deterministic kernels wherever it has them; a test that repeats sees the others by itself."""
    import torch

    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
