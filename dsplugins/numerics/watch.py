"""Where something that quantises shows what it makes of what, and costs a comparison while nobody looks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from dsplugins.numerics.tiles import Quantised

Look = Callable[[str, "torch.Tensor", "Quantised"], None]
"""`look(operand, values, made)`: numbers [M, K] and their codes, inside of a step: look, don't change."""


class Watch:
    """Of one linear. Modules show theirs as `watches`: part of the module (or "" for all of it) -> Watch.

    Operands are named by product and tensor, in the report's terms (arXiv 2412.19437, 3.3.1): `fprop.x`,
    `fprop.w`, `dgrad.dy`, `wgrad.dy`, `wgrad.x`; `kept.x` is what backward makes an input from again.
    """

    look: Look | None = None

    def saw(self, operand: str, values: torch.Tensor, made: Quantised) -> Quantised:
        """`made`, after whoever looks has seen it."""
        if self.look is not None:
            self.look(operand, values, made)
        return made
