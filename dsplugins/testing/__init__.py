"""What plugin authors test with: resident worker processes and a model-parallel world in miniature.

    from dsplugins.testing import model_parallel

    def job(scale):                             # a module-level function: it runs on every rank
        with model_parallel(tensor=2):
            ...
            return {"loss": ...}

    def test_x(workers):
        first, second = workers(2).run(job, 0.5)

Importing megatron-core takes seconds: one process does it, the others are forked from it and kept. Put
`pytest_plugins = ["dsplugins.testing"]` into a `conftest.py` for the fixtures `workers` and `single`.
"""

from __future__ import annotations

import gc
import importlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

from dsplugins.testing.pool import JobFailed, Workers
from dsplugins.testing.world import model_parallel, prepare_cpu, temporary_groups

if TYPE_CHECKING:
    import torch


@pytest.fixture(scope="session")
def workers() -> Iterator[Callable[[int], Workers]]:
    """`workers(n)`: the session's pool of n ranks."""
    pools: dict[int, Workers] = {}

    def pool(size: int) -> Workers:
        return pools.setdefault(size, Workers(size))

    yield pool
    for started in pools.values():
        started.stop()


@pytest.fixture(scope="session")
def _world_of_one() -> Iterator[torch.device]:
    """This process as a gloo world of its own, with the CPU platform."""
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        pytest.skip("runs where no GPU is visible: CUDA_VISIBLE_DEVICES=''")
    device = prepare_cpu()
    importlib.import_module("dsplugins.assemble")
    gc.freeze()  # what was imported stays: a collection after each test then has little to look through
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield device
    dist.destroy_process_group()


@pytest.fixture
def single(_world_of_one: torch.device) -> Iterator[torch.device]:
    """One rank in the pytest process, all parallel sizes 1, seed 1234; gives the device."""
    with model_parallel():
        yield _world_of_one


__all__ = ["JobFailed", "Workers", "model_parallel", "prepare_cpu", "single", "temporary_groups", "workers"]
