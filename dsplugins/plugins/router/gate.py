"""What the routers here share: the gate, the counts, and how a balance loss is attached."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import Router

from dsplugins.plugins.router.logits import GateLogits

DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


class CountingRouter(Router):
    """A router that counts its tokens per expert and its balance loss, as `contracts.RouterFactory` asks.

    Buffers: `local_tokens_per_expert` float32 [E], `aux_loss_sum` float32 [], neither saved. Both grow in
    backward: it runs once a micro-batch, while activation recomputing may run forward twice. A subclass
    gives `routing(logits [S, B, E])`, which ends in `recorded`.
    """

    def __init__(self, config: Any, pg_collection: Any = None, is_mtp_layer: bool = False) -> None:
        super().__init__(config=config, pg_collection=pg_collection, is_mtp_layer=is_mtp_layer)
        self._buffer("local_tokens_per_expert", (config.num_moe_experts,), persistent=False)
        self._buffer("aux_loss_sum", (), persistent=False)

    def _buffer(self, name: str, shape: tuple[int, ...], persistent: bool) -> None:
        zeros = torch.zeros(shape, dtype=torch.float32, device=self.weight.device)
        self.register_buffer(name, zeros, persistent=persistent)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> CountingRouter:
        """Move with the module, but keep buffers in float32: in bfloat16 counts stop at 256."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(device=moved.device)
        return self

    def forward(
        self, input: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(probs [T, E] in the logits' dtype, map bool [T, E]) for input [S, B, H]; T = S * B.

        Raises ValueError for a padding mask: padded tokens would be counted and balanced.
        """
        if padding_mask is not None:
            raise ValueError("padding_mask: batches here have no padding, and this router would count it")
        return self.routing(self.gating(input))

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        """Logits [S, B, E] in `moe_router_dtype`, whatever is installed; the weight stays where it is."""
        dtype = DTYPES.get(self.config.moe_router_dtype, input.dtype)
        logits: torch.Tensor = GateLogits.apply(input, self.weight, self.bias, dtype)
        return logits

    @property
    def recording(self) -> bool:
        """Whether this pass counts: training, not the first of two passes of a recomputed layer."""
        return self.training and torch.is_grad_enabled()

    def recorded(
        self, probs: torch.Tensor, routing_map: torch.Tensor, loss: torch.Tensor | None
    ) -> torch.Tensor:
        """`probs` [T, E], whose backward counts the map, and also starts at `loss`: this rank's share, []."""
        if not self.recording:
            return probs
        if loss is not None:
            if self.is_mtp_layer and self.config.mtp_use_repeated_layer:
                loss = loss / self.config.mtp_num_layers  # one layer, run so many times in a micro-batch
            probs = MoEAuxLossAutoScaler.apply(probs, loss * self._scale(len(probs)))
            loss = loss.detach()
        counts = routing_map.sum(dim=0)
        if not probs.requires_grad:  # a frozen gate: no backward will come by here
            self.add(counts, loss)
            return probs
        return _Recorded.apply(probs, self, counts, loss)

    def _scale(self, tokens: int) -> int:
        """What core multiplies a balance loss by, to undo its division of all gradients by the tokens."""
        return tokens * self.tp_cp_group.size() if self.calculate_per_token_loss else 1

    @torch.no_grad()
    def add(self, counts: torch.Tensor, loss: torch.Tensor | None) -> None:
        """Note one micro-batch: tokens per expert [E], and its balance loss []."""
        self.local_tokens_per_expert += counts
        if loss is not None:
            self.aux_loss_sum += loss

    def summed_over_sequence(self, counts: torch.Tensor) -> torch.Tensor:
        """Counts summed over the ranks that hold parts of the same sequences (sequence parallel, CP)."""
        if self.tp_cp_group.size() > 1:
            counts = counts.clone()
            torch.distributed.all_reduce(counts, group=self.tp_cp_group)
        return counts


class _Recorded(torch.autograd.Function):
    """Identity on `probs`; its backward adds to the router's buffers."""

    @staticmethod
    def forward(
        ctx: Any,
        probs: torch.Tensor,
        router: CountingRouter,
        counts: torch.Tensor,
        loss: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.router, ctx.counts, ctx.loss = router, counts, loss
        return probs.view_as(probs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        ctx.router.add(ctx.counts, ctx.loss)
        return grads[0], None, None, None
