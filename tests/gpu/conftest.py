"""A world of one GPU for the tests that are marked `gpu`; the others here run on the CPU platform."""

from __future__ import annotations

import os

import pytest


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
