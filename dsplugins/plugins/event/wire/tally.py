"""Counting collectives: every call of torch.distributed, from any thread, with its size and its group.

torch.distributed hands each collective to torch's dispatcher as an operator of the library `c10d`, whoever
calls it: Python, an autograd thread, a coalescing manager. While a tally runs, a kernel of ours stands before
those operators, in the place where autograd's would be, counts, and passes on what it was given. Outside of
that nothing stands there. What goes around torch.distributed, such as DeepEP's own transport, is not seen.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.distributed import ProcessGroup

from dsplugins.plugins.event.wire.groups import name


class Key(NamedTuple):
    """A row of the table."""

    kind: str
    """`all_reduce`, `reduce_scatter`, `all_gather`, `all_to_all`, `broadcast`, `send`, ..."""
    group: str
    """See `groups.NAMES`."""


@dataclass
class Traffic:
    """Calls of one kind in one group by one rank."""

    calls: float = 0
    payload: float = 0
    """Bytes of the whole buffers: what is reduced, or put together by a gather; of an all-to-all what this
    rank puts in, its own share included; of `recv` what arrives."""
    sent: float = 0
    """Bytes that this rank sends to others, if the collective is done in a ring: of n ranks, (n - 1) / n of a
    payload, twice that in an all-reduce. Exact for `send` and for all-to-all, where it is all but the rank's
    own share."""

    def add(self, other: Traffic) -> None:
        """Take in other calls."""
        self.calls += other.calls
        self.payload += other.payload
        self.sent += other.sent


Reading = Callable[[tuple[Any, ...], int, int], tuple[float, float]]
"""(arguments, ranks in the group, rank in it) -> (payload, sent)."""


class Tally:
    """Traffic of this process by kind and group while it runs; groups of one rank are left out."""

    def __init__(self) -> None:
        self.traffic: dict[Key, Traffic] = defaultdict(Traffic)
        self._library: torch.library.Library | None = None

    @property
    def runs(self) -> bool:
        """Whether collectives are being counted."""
        return self._library is not None

    def start(self) -> None:
        """Count from now on, from nothing."""
        assert not self.runs, "it runs already"
        self.traffic = defaultdict(Traffic)
        self._library = torch.library.Library("c10d", "IMPL")
        for operator, (kind, reading) in READINGS.items():
            if hasattr(torch.ops.c10d, operator):
                kernel = self._kernel(getattr(torch.ops.c10d, operator).default, kind, reading)
                self._library.impl(operator, kernel, "Autograd", with_keyset=True)

    def stop(self) -> dict[Key, Traffic]:
        """What was counted; from now on nothing is."""
        self._library = None  # torch takes the kernels away with the library that brought them
        return dict(self.traffic)

    def _kernel(self, operator: Any, kind: str, reading: Reading) -> Callable[..., Any]:
        traffic, below = self.traffic, torch._C._after_autograd_keyset

        def kernel(keys: Any, *args: Any) -> Any:
            group = next(ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject))
            if (ranks := group.size()) > 1:
                payload, sent = reading(args, ranks, group.rank())
                traffic[Key(kind, name(group))].add(Traffic(1, payload, sent))
            return operator.redispatch(keys & below, *args)

        return kernel


def _size(tensors: Any) -> int:
    """Bytes of a tensor, or of all tensors in nested lists."""
    if isinstance(tensors, torch.Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(map(_size, tensors))


def _ring(which: int, rounds: int = 1) -> Reading:
    """A collective whose payload is argument `which` and goes round the ring so many times."""

    def reading(args: tuple[Any, ...], ranks: int, rank: int) -> tuple[float, float]:
        payload = _size(args[which])
        return payload, rounds * payload * (ranks - 1) / ranks

    return reading


def _to_one(args: tuple[Any, ...], ranks: int, rank: int) -> tuple[float, float]:
    """gather: each rank but the root sends its own."""
    payload = _size(args[1])
    return payload, 0 if rank == args[3] else payload


def _all_to_all_single(args: tuple[Any, ...], ranks: int, rank: int) -> tuple[float, float]:
    """One tensor, cut along its first dimension as the split sizes say, evenly where there are none."""
    tensor, splits = args[1], args[4]
    payload = _size(tensor)
    own = splits[rank] / max(1, tensor.shape[0]) if splits else 1 / ranks
    return payload, payload * (1 - own)


def _all_to_all_list(args: tuple[Any, ...], ranks: int, rank: int) -> tuple[float, float]:
    payload = _size(args[1])
    return payload, payload - _size(args[1][rank])


def _sent(args: tuple[Any, ...], ranks: int, rank: int) -> tuple[float, float]:
    return _size(args[0]), _size(args[0])


def _received(args: tuple[Any, ...], ranks: int, rank: int) -> tuple[float, float]:
    return _size(args[0]), 0


def _nothing(args: tuple[Any, ...], ranks: int, rank: int) -> tuple[float, float]:
    return 0, 0


READINGS: dict[str, tuple[str, Reading]] = {
    "allreduce_": ("all_reduce", _ring(0, rounds=2)),
    "allreduce_coalesced_": ("all_reduce", _ring(0, rounds=2)),
    "reduce_": ("reduce", _ring(0)),
    "broadcast_": ("broadcast", _ring(0)),
    "allgather_": ("all_gather", _ring(0)),
    "_allgather_base_": ("all_gather", _ring(0)),
    "allgather_coalesced_": ("all_gather", _ring(0)),
    "allgather_into_tensor_coalesced_": ("all_gather", _ring(0)),
    "reduce_scatter_": ("reduce_scatter", _ring(1)),
    "_reduce_scatter_base_": ("reduce_scatter", _ring(1)),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", _ring(1)),
    "scatter_": ("scatter", _ring(1)),
    "gather_": ("gather", _to_one),
    "gather_into_tensor_": ("gather", _to_one),
    "alltoall_base_": ("all_to_all", _all_to_all_single),
    "alltoall_": ("all_to_all", _all_to_all_list),
    "send": ("send", _sent),
    "recv_": ("recv", _received),
    "recv_any_source_": ("recv", _received),
    "barrier": ("barrier", _nothing),
    "monitored_barrier_": ("barrier", _nothing),
}
"""Operator of torch's library `c10d` -> its kind, and how its sizes are read from its arguments."""
