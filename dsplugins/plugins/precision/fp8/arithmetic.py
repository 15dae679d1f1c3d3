"""What quantises and multiplies for every FP8 linear: one meaning, several implementations.

`reference.Reference` is the meaning. An implementation makes the same codes and scales, and differs from it
in the order of sums only. Imported from hook bodies only: it needs torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from dsplugins.numerics.tiles import SMALLEST_AMAX, Quantised
from dsplugins.plugins.precision.fp8.e5m6 import Packed
from dsplugins.plugins.precision.fp8.swiglu import SwigluKept


class Arithmetic(Protocol):
    """Casts and products. Each of E experts has a run of the tokens, as long as `splits` says; a plain linear
    is one expert with all of them.

    Codes are E4M3, scales FP32 and multiply the codes. `power_of_two` rounds scales up to powers of two.
    """

    def rows(self, x: torch.Tensor, power_of_two: bool, smallest: float = SMALLEST_AMAX) -> Quantised:
        """x [T, K] in tiles of 128 channels of a token. `smallest` bounds a tile's amax from below."""
        raise NotImplementedError

    def columns(
        self,
        x: torch.Tensor | Quantised,
        splits: Sequence[int],
        power_of_two: bool,
        smallest: float = SMALLEST_AMAX,
    ) -> Sequence[Quantised]:
        """Each run of x [T, K] transposed, [K, t], in tiles of 128 tokens of a channel.

        No tile reaches into the next run. Codes of `rows` are taken back to numbers first (report, 3.3.3).
        """
        raise NotImplementedError

    def blocks(self, weight: torch.Tensor, power_of_two: bool, transposed: bool = False) -> Quantised:
        """weight [E, N, K] in tiles of 128 x 128: codes [E, N, K], or [E, K, N] where `transposed`."""
        raise NotImplementedError

    def swiglu_rows(self, inner: torch.Tensor, probs: torch.Tensor | None, power_of_two: bool) -> Quantised:
        """`rows` of SwiGLU of inner [T, 2I] times probs [T], rounded to the format of inner first."""
        raise NotImplementedError

    def swiglu_columns(
        self, kept: SwigluKept, splits: Sequence[int], power_of_two: bool
    ) -> Sequence[Quantised]:
        """`columns` of SwiGLU's output [T, I], made again from what was kept of its input."""
        raise NotImplementedError

    def swiglu_gradient(self, kept: SwigluKept, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Gradients of SwiGLU's input [T, 2I] and of probs [T] (None without), from dy [T, I]."""
        raise NotImplementedError

    def pack(self, x: torch.Tensor) -> Packed:
        """x [T, K] in E5M6, scales of powers of two."""
        raise NotImplementedError

    def unpack(self, packed: Packed) -> torch.Tensor:
        """BF16 [T, K], which holds every number of E5M6 times a power of two."""
        raise NotImplementedError

    def product(
        self, x: Quantised, weights: Quantised, splits: Sequence[int], dtype: torch.dtype
    ) -> torch.Tensor:
        """Each run of x [T, K] times its weight of `blocks` [E, N, K] transposed: [T, N], summed in FP32."""
        raise NotImplementedError

    def weight_gradient(self, dy: Sequence[Quantised], x: Sequence[Quantised], into: torch.Tensor) -> None:
        """Add dy [N, t] times x [K, t] transposed of each run to `into`, FP32 [E, N, K]."""
        raise NotImplementedError
