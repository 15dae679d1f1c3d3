"""SwiGLU and the down-projection behind it as one step, of which backward keeps the input in FP8.

The report keeps the inputs of the experts' SwiGLU in FP8 and makes its output again in backward (3.3.3).
Imported from hook bodies only: it needs torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SwigluInput:
    """What the up-projection gave, on its way to a down-projection that applies SwiGLU itself."""

    inner: torch.Tensor
    """[..., 2I], gate first."""
    probs: torch.Tensor | None
    """[...], what each token's result is multiplied by; None for one."""


def forward(inner: torch.Tensor, probs: torch.Tensor | None) -> torch.Tensor:
    """silu(gate) * up * probs: [T, 2I], [T] -> FP32 [T, I]."""
    gate, up = inner.float().chunk(2, dim=-1)
    y = torch.nn.functional.silu(gate) * up
    return y if probs is None else y * probs.float().unsqueeze(-1)


def backward(
    inner: torch.Tensor, probs: torch.Tensor | None, dy: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of inner [T, 2I] and probs [T], FP32, from that of the output [T, I]."""
    gate, up = inner.float().chunk(2, dim=-1)
    dy = dy.float()
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    dprobs = None
    if probs is not None:
        dprobs = (dy * silu * up).sum(-1)
        dy = dy * probs.float().unsqueeze(-1)
    dgate = dy * up * (sigmoid + silu * (1 - sigmoid))
    return torch.cat([dgate, dy * silu], dim=-1), dprobs
