"""Tensors whose memory is given back after forward and filled again for backward.

Who recomputes notes them; who keeps something made of its input, as FP8's codes, asks, and saves the input
itself where that costs nothing. Imported from hook bodies only: it needs torch.
"""

from __future__ import annotations

import torch
from torch.multiprocessing.reductions import StorageWeakRef

_NOTED: set[StorageWeakRef] = set()
"""Memory that is not yet given back. Its number stays its own as long as the reference is here."""


def note(storage: StorageWeakRef) -> None:
    """This memory is given back at the end of the layer that is running, if backward holds it then."""
    _NOTED.add(storage)


def forget(storage: StorageWeakRef) -> None:
    """It was given back, or it wasn't: whoever asks from now on is to keep what it needs."""
    _NOTED.discard(storage)


def noted(x: torch.Tensor) -> bool:
    """Whether keeping `x` for backward keeps no memory."""
    return bool(_NOTED) and StorageWeakRef(x.untyped_storage()) in _NOTED
