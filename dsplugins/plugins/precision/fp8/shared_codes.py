"""One cast where linears read the same tensor one after the other, as MLA's two down-projections do.

Backward of the first one keeps the codes; the next takes those, so that they are made once and kept once.
Where no backward has them (evaluation, the first of two passes), each linear casts. Those of an input that is
made again for backward (`numerics.remade`) are held here, until the next cast and no longer.
Imported from hook bodies only: it needs torch.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from dsplugins.numerics.tiles import ROW, Quantised

if TYPE_CHECKING:
    from dsplugins.plugins.precision.fp8.rule import Rule


@dataclass(frozen=True)
class Made:
    """A cast: of what, and where its result is as long as somebody has it."""

    storage: StorageWeakRef
    """Of the input. Its memory goes when the input goes, its number stays its own as long as this is here."""
    of: tuple[Any, ...]
    """Which part of that, how often it had been written to, and how it was cast."""
    codes: weakref.ref[torch.Tensor]
    scales: weakref.ref[torch.Tensor]
    held: Quantised | None
    """The result itself, where nobody else has it."""

    def found(self) -> Quantised | None:
        """The result, if backward of some linear keeps it."""
        codes, scales = self.codes(), self.scales()
        return None if codes is None or scales is None else Quantised(codes, scales, ROW)


_LATEST: list[Made] = []
"""The last cast, and no other: it is replaced before its input's memory can come again in another step."""


def rows(x: torch.Tensor, rule: Rule, hold: bool = False) -> Quantised:
    """`x` [T, K] in tiles of 1 x 128; the latest codes, if they are of the same numbers by the same rule.

    `hold`: until the next cast they are, though nobody keeps them.
    """
    if x.is_inference():  # nobody counts how often it is written to
        return rule.arithmetic.rows(x, rule.input)
    storage = StorageWeakRef(x.untyped_storage())
    part = x.storage_offset(), x.shape, x.stride(), x.dtype
    of = (*part, x._version, rule.arithmetic, rule.input)
    for latest in _LATEST:
        if latest.storage == storage and latest.of == of and (found := latest.found()) is not None:
            return found
    made = rule.arithmetic.rows(x, rule.input)
    held = made if hold else None
    _LATEST[:] = [Made(storage, of, weakref.ref(made.codes), weakref.ref(made.scales), held)]
    return made
