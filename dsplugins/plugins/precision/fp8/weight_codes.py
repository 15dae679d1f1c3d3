"""Codes of weights: made for each product, or once a step and kept at the weight.

Imported from hook bodies only: it needs torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from dsplugins.numerics.tiles import Quantised
    from dsplugins.plugins.precision.fp8.rule import Rule

KEPT = "fp8_v3_codes"
"""Attribute of a weight: whether transposed -> codes."""


def of(weight: Any, stack: torch.Tensor, rule: Rule, transposed: bool = False) -> Quantised:
    """Tiles of 128 x 128 of `stack` [E, N, K], which is `weight`; kept ones, where the rule says so."""
    kept: dict[bool, Quantised] = (getattr(weight, KEPT, None) or {}) if rule.keep_weights else {}
    if transposed not in kept:
        kept[transposed] = rule.arithmetic.blocks(stack, rule.weight, transposed)
        if rule.keep_weights:
            setattr(weight, KEPT, kept)
    return kept[transposed]


def forget(chunks: Iterable[torch.nn.Module]) -> None:
    """Drop what is kept: the weights are about to change."""
    for chunk in chunks:
        for weight in chunk.parameters():
            if hasattr(weight, KEPT):
                delattr(weight, KEPT)
