"""The two exchanges between ranks of an expert-parallel group, each in FP8 one way and in 16 bits the other.

Imported from hook bodies only: it needs torch and megatron-core.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel import all_to_all

from dsplugins.numerics.tiles import SMALLEST_AMAX, SMALLEST_GRADIENT, TILE
from dsplugins.plugins.dispatcher.alltoall_dispatcher import AllToAllDispatcher
from dsplugins.plugins.dispatcher.fp8_payload import pack, unpack


@dataclass(frozen=True)
class Route:
    """How many rows go where, seen from the side of the tokens."""

    group: Any
    to_experts: Any
    """Rows that each rank of the group gets from this one; None: all the same number."""
    from_ranks: Any
    """Rows that this rank's experts get from each; None: all the same number."""
    own_stream: bool
    """Whether the exchange runs beside what is computed (core's `use_nccl_stream`)."""

    def there(self, rows: torch.Tensor) -> torch.Tensor:
        """From the tokens to the experts."""
        return self._exchange(rows, self.from_ranks, self.to_experts)

    def back(self, rows: torch.Tensor) -> torch.Tensor:
        """From the experts to where the tokens came from."""
        return self._exchange(rows, self.to_experts, self.from_ranks)

    def _exchange(self, rows: torch.Tensor, received: Any, sent: Any) -> torch.Tensor:
        moved: torch.Tensor = all_to_all(self.group, rows, received, sent, use_nccl_stream=self.own_stream)
        return moved


class ToExperts(torch.autograd.Function):
    """Tokens [T, H] to their experts in FP8; their gradients back in the tokens' format."""

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, route: Route) -> torch.Tensor:
        ctx.route = route
        return _in_fp8(tokens, route, SMALLEST_AMAX)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.route.back(gradient), None


class FromExperts(torch.autograd.Function):
    """Outputs [T, H] to where the tokens came from, as they are; their gradients to the experts in FP8."""

    @staticmethod
    def forward(ctx: Any, outputs: torch.Tensor, route: Route) -> torch.Tensor:
        ctx.route = route
        return route.back(outputs)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _in_fp8(gradient, ctx.route, SMALLEST_GRADIENT), None


def _in_fp8(rows: torch.Tensor, route: Route, smallest: float) -> torch.Tensor:
    """`rows` [T, H] rounded to E4M3 and brought to the experts, in the format that they had."""
    return unpack(route.there(pack(rows, smallest)), rows.shape[1], rows.dtype)


class Fp8AllToAllDispatcher(AllToAllDispatcher):
    """`alltoall`'s dispatcher but for the two exchanges."""

    def dispatched_bytes(self, width: int) -> int:
        """A code for each channel, an exponent for each 128."""
        hidden = int(self.config.hidden_size)
        return hidden + -(-hidden // TILE)

    def token_dispatch(
        self, permutated_local_input_tokens: torch.Tensor, permuted_probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [T, H] and probs [T] to the ranks of their experts."""
        counts = self._maybe_dtoh_and_synchronize("before_ep_alltoall", self.tokens_per_expert)
        self.tokens_per_expert = counts
        tokens: torch.Tensor = ToExperts.apply(permutated_local_input_tokens, self._route())
        probs = all_to_all(
            self.ep_group,
            permuted_probs,
            self.output_splits,
            self.input_splits,
            use_nccl_stream=self.use_nccl_stream,
        )
        return tokens, probs

    def token_combine(
        self, hidden_states: torch.Tensor, async_finish: bool = True, allocate_on_comm_stream: bool = True
    ) -> torch.Tensor:
        """Outputs [T, H] to the ranks of their tokens."""
        outputs: torch.Tensor = FromExperts.apply(hidden_states, self._route())
        return outputs

    def _route(self) -> Route:
        return Route(self.ep_group, self.input_splits, self.output_splits, bool(self.use_nccl_stream))
