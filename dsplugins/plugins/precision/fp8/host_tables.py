"""Small tables made on the host, brought to a device once and without waiting for it.

Imported from hook bodies only: it needs torch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, cast

import torch

IN_FLIGHT = 128
"""Calls whose tables stay: twice the four layers and sixteen micro-batches that a stage of V3's has between
forward and backward. The largest, DeepGEMM's, have 12 bytes a row: 50 MB for 32,768 rows in each."""


def on_device[Tables: tuple[torch.Tensor | None, ...]](make: Callable[..., Tables]) -> Callable[..., Tables]:
    """`make(*given)` on the host becomes `tables(*given, device=)` there, made anew when it is forgotten."""

    @lru_cache(maxsize=IN_FLIGHT)
    def kept(given: tuple[Any, ...], device: torch.device, stream: int) -> Tables:
        on_host = make(*given)
        return cast("Tables", tuple(None if one is None else sent(one, device) for one in on_host))

    def tables(*given: Any, device: torch.device) -> Tables:
        return kept(given, device, _stream(device))

    return tables


def sent(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`table` on the device. From pageable memory the copy would wait for all that is queued there before it.

    Nobody holds the pinned memory afterwards, and the copy may still be to come: torch's caching host
    allocator notes the stream of each such copy and gives the memory to no other before it is done.
    """
    if device.type != "cuda":
        return table.to(device)
    return table.pin_memory().to(device, non_blocking=True)


def _stream(device: torch.device) -> int:
    """The copy is in order with what this stream does, and with nothing else: another one has its own."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
