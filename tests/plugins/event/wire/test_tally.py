"""Every collective of torch.distributed is counted once, with its size, its group and what is sent."""

from __future__ import annotations

import threading
from typing import Any

import pytest

ONCE: dict[str, tuple[str, float, float]] = {
    "all_reduce": ("all_reduce", 32, 32),
    "all_reduce, not waited for": ("all_reduce", 32, 32),
    "all_reduce, coalesced": ("all_reduce", 64, 64),
    "reduce": ("reduce", 32, 16),
    "broadcast": ("broadcast", 32, 16),
    "all_gather": ("all_gather", 64, 32),
    "all_gather into one": ("all_gather", 64, 32),
    "all_gather, coalesced": ("all_gather", 64, 32),
    "reduce_scatter": ("reduce_scatter", 64, 32),
    "reduce_scatter of one": ("reduce_scatter", 64, 32),
    "reduce_scatter, coalesced": ("reduce_scatter", 64, 32),
    "all_to_all, even": ("all_to_all", 64, 32),
    "all_to_all, uneven": ("all_to_all", 64, 16),
    "from a backward pass": ("all_reduce", 32, 32),
    "from another thread": ("all_reduce", 32, 32),
    "barrier": ("barrier", 0, 0),
}
"""What is done -> kind, payload and sent bytes of rank 0 of two, with rows of eight FP32 numbers."""


def calls(group: Any) -> dict[str, Any]:
    """The collectives, by name."""
    import torch
    import torch.distributed as dist

    row, both = torch.ones(8), torch.ones(16)
    parts = [torch.empty(8), torch.empty(8)]
    uneven = [12, 4] if dist.get_rank() == 0 else [4, 12]

    class Summed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            gradient = gradient.contiguous()  # a sum's gradient is one number, seen eight times
            dist.all_reduce(gradient, group=group)
            return gradient

    def coalesced(*work: Any) -> None:
        with dist._coalescing_manager(group, async_ops=True) as manager:
            for call in work:
                call()
        manager.wait()

    def threaded() -> None:
        thread = threading.Thread(target=dist.all_reduce, args=(row,), kwargs={"group": group})
        thread.start()
        thread.join()

    def all_reduce() -> None:
        dist.all_reduce(row, group=group)

    def gather() -> None:
        dist.all_gather_into_tensor(both, row, group=group)

    def scatter() -> None:
        dist.reduce_scatter_tensor(row, both, group=group)

    return {
        "all_reduce": all_reduce,
        "all_reduce, not waited for": lambda: dist.all_reduce(row, group=group, async_op=True).wait(),
        "all_reduce, coalesced": lambda: coalesced(all_reduce, all_reduce),
        "reduce": lambda: dist.reduce(row, group=group, group_dst=0),
        "broadcast": lambda: dist.broadcast(row, group=group, group_src=0),
        "all_gather": lambda: dist.all_gather(parts, row, group=group),
        "all_gather into one": gather,
        "all_gather, coalesced": lambda: coalesced(gather),
        "reduce_scatter": lambda: dist.reduce_scatter(row, parts, group=group),
        "reduce_scatter of one": scatter,
        "reduce_scatter, coalesced": lambda: coalesced(scatter),
        "all_to_all, even": lambda: dist.all_to_all_single(torch.empty(16), both, group=group),
        "all_to_all, uneven": lambda: dist.all_to_all_single(
            torch.empty(16), both, uneven, uneven, group=group
        ),
        "from a backward pass": lambda: Summed.apply(row.clone().requires_grad_()).sum().backward(),
        "from another thread": threaded,
        "barrier": lambda: dist.barrier(group=group),
    }


def counted() -> dict[str, list[tuple[str, str, float, float, float]]]:
    from megatron.core import parallel_state

    from dsplugins.plugins.event.wire.tally import Tally
    from dsplugins.testing import model_parallel

    found = {}
    with model_parallel(tensor=2):
        for name, call in calls(parallel_state.get_tensor_model_parallel_group()).items():
            tally = Tally()
            tally.start()
            call()
            traffic = tally.stop()
            call()
            found[name] = [(*key, row.calls, row.payload, row.sent) for key, row in traffic.items()]
    return found


@pytest.fixture(scope="module")
def found(workers):
    return workers(2).run(counted)


@pytest.mark.parametrize("name", ONCE)
def test_one_call_is_one_row(found, name):
    kind, payload, sent = ONCE[name]
    assert [rank[name] for rank in found] == [[(kind, "tensor", 1, payload, sent)]] * 2


def messages() -> list[tuple[str, str, float, float, float]]:
    """Rank 0 sends to rank 1; and something to itself, which is not on the wire."""
    import torch
    import torch.distributed as dist

    from dsplugins.plugins.event.wire.tally import Tally

    alone = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
    tally = Tally()
    tally.start()
    dist.all_reduce(torch.ones(8), group=alone)
    if dist.get_rank() == 0:
        dist.send(torch.ones(8), 1)
    else:
        dist.recv(torch.ones(8), 0)
    dist.destroy_process_group(alone)
    return [(*key, row.calls, row.payload, row.sent) for key, row in tally.stop().items()]


def test_a_message_is_sent_once_and_a_group_of_one_sends_nothing(workers):
    assert workers(2).run(messages) == [[("send", "world", 1, 32, 32)], [("recv", "world", 1, 32, 0)]]


def test_no_operator_of_torch_is_forgotten():
    """A collective that a later torch adds would go by uncounted."""
    import torch
    import torch.distributed

    from dsplugins.plugins.event.wire.tally import READINGS

    there = {
        name.removeprefix("c10d::") for name in torch._C._dispatch_get_all_op_names() if "c10d::" in name
    }
    there = {name for name in there if not name.startswith("_c10d_functional")}
    assert there - set(READINGS) <= {"check_for_nan"}
    assert set(READINGS) - there <= {"gather_into_tensor_"}, "newer than the oldest torch that is supported"


def kernels():
    """Where the code stands that an all-reduce of each device goes through first."""
    import torch

    lines = torch._C._dispatch_dump_table("c10d::allreduce_").splitlines()
    return {line.split(":")[0]: line for line in lines if line.startswith(("AutogradCPU:", "AutogradCUDA:"))}


def test_it_stands_in_the_way_only_while_it_counts_and_of_every_device():
    import torch.distributed  # noqa: F401

    from dsplugins.plugins.event.wire.tally import Tally

    before, tally = kernels(), Tally()
    tally.start()
    during = kernels()
    tally.stop()
    assert len(before) == 2 and not any("wire/tally.py" in line for line in before.values())
    assert all("wire/tally.py" in line for line in during.values())
    assert kernels() == before
