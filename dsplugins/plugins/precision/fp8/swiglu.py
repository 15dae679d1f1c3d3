"""SwiGLU and the down-projection behind it as one step, of which backward keeps the input in FP8.

The report keeps the inputs of the experts' SwiGLU in FP8 and makes its output again in backward (3.3.3); so
it is done in dense MLPs, too.
Imported from hook bodies only: it needs torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dsplugins.numerics.tiles import Quantised, dequantise


@dataclass(frozen=True)
class SwigluInput:
    """What the up-projection gave, on its way to a down-projection that applies SwiGLU itself."""

    inner: torch.Tensor
    """[..., 2I], gate first."""
    probs: torch.Tensor | None
    """[...], what each token's result is multiplied by; None for one."""


@dataclass(frozen=True)
class SwigluKept:
    """What backward has of SwiGLU's input: codes, and what they were multiplied by."""

    inner: Quantised
    """[T, 2I] in tiles of 1 x 128, gate first."""
    probs: torch.Tensor | None
    """[T], or None for one."""
    dtype: torch.dtype
    """The format that `inner` had, and that it is rounded to again."""

    @property
    def channels(self) -> int:
        """I."""
        return self.inner.codes.shape[1] // 2

    def numbers(self) -> torch.Tensor:
        """The input [T, 2I]."""
        return dequantise(self.inner).to(self.dtype)

    def active(self) -> torch.Tensor:
        """SwiGLU of it times probs, made again: [T, I]."""
        return forward(self.numbers(), self.probs).to(self.dtype)


def forward(inner: torch.Tensor, probs: torch.Tensor | None) -> torch.Tensor:
    """silu(gate) * up * probs: [T, 2I], [T] -> FP32 [T, I]."""
    gate, up = inner.float().chunk(2, dim=-1)
    y = torch.nn.functional.silu(gate) * up
    return y if probs is None else y * probs.float().unsqueeze(-1)


def backward(kept: SwigluKept, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of the input [T, 2I] and of probs [T] in their formats, from that of the output [T, I]."""
    gate, up = kept.numbers().float().chunk(2, dim=-1)
    dy = dy.float()
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    dprobs = None
    if kept.probs is not None:
        dprobs = (dy * silu * up).sum(-1).to(kept.probs.dtype)
        dy = dy * kept.probs.float().unsqueeze(-1)
    dgate = dy * up * (sigmoid + silu * (1 - sigmoid))
    return torch.cat([dgate, dy * silu], dim=-1).to(kept.dtype), dprobs
