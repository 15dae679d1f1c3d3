"""megatron-core's all-to-all dispatcher, also where there is no device or no other rank to wait for, and
with copies of tokens added up by `copies` where there is a device.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

from dsplugins.plugins.dispatcher.copies import FromCopies, Order, ToCopies

SPLITS = ("input_splits", "output_splits", "output_splits_tp")


class AllToAllDispatcher(MoEAlltoAllTokenDispatcher):
    """On the CPU, split sizes become NumPy arrays there too.

    Core makes them arrays while it copies them from the device (`maybe_move_tensor_to_cpu`) and leaves
    alone what is on the CPU already; no all-to-all takes tensors as sizes.

    Where one rank holds all experts, the first permutation has already sorted the tokens by expert; core
    sorts them once more, after the all-to-all, and back: four copies of all tokens in a step, left out here.

    On CUDA a token's copies are added up by `copies`, in the place of core's atomics (its deterministic
    kernels, where those are asked for).
    """

    tokens_per_expert: torch.Tensor | None
    _order: Order | None = None
    """Of the tokens under way, where copies are added up here."""

    @property
    def _alone(self) -> bool:
        """Whether chunks arrive in the order in which they are wanted: from this rank, expert by expert."""
        return self.ep_size * self.tp_size == 1

    def dispatched_bytes(self, width: int) -> int:
        """Bytes of one token on its way to an expert, where a number has `width` of them."""
        return int(self.config.hidden_size) * width

    def dispatch_preprocess(
        self, hidden_states: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies [T * k, H] of tokens [S, B, H], sorted by expert, and probs [T * k]."""
        self._order = None
        if not self._adds_up(hidden_states):
            return super().dispatch_preprocess(hidden_states, routing_map, probs)
        column = hidden_states.detach()[..., :1]  # core counts and sorts; what it moves is not used
        _, sorted_probs = super().dispatch_preprocess(column, routing_map, probs)
        tokens = hidden_states.view(-1, hidden_states.shape[-1])
        self.hidden_shape = hidden_states.shape
        order = Order.of(self.reversed_local_input_permutation_mapping, self.config.moe_router_topk)
        self._order = order
        return ToCopies.apply(tokens, order), sorted_probs

    def combine_postprocess(self, permutated_local_input_tokens: torch.Tensor) -> torch.Tensor:
        """Each token's sum of what its experts made of it, [S, B, H]."""
        if self._order is None:
            return super().combine_postprocess(permutated_local_input_tokens)
        summed: torch.Tensor = FromCopies.apply(permutated_local_input_tokens, self._order)
        return summed.view(self.hidden_shape)

    def _adds_up(self, hidden_states: torch.Tensor) -> bool:
        """Whether every token has as many copies, and nobody else moves or reads them here: no capacity, no
        padding, no fused kernels, no shared experts beside the exchange.
        """
        config = self.config
        return (
            hidden_states.is_cuda
            and config.moe_expert_capacity_factor is None
            and not config.moe_router_padding_for_quantization
            and not config.moe_permute_fusion
            and self.shared_experts is None
        )

    def dispatch_postprocess(
        self, global_input_tokens: torch.Tensor, global_probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Tokens [T, H] sorted by this rank's experts, counts [E], probs [T]."""
        if not self._alone:
            return super().dispatch_postprocess(global_input_tokens, global_probs)
        counts = self._maybe_dtoh_and_synchronize("before_permutation_2", self.tokens_per_expert)
        counts = self._maybe_dtoh_and_synchronize("before_finish", counts)
        self.tokens_per_expert = None
        return global_input_tokens, counts, global_probs

    def combine_preprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Outputs [T, H] in the order in which the tokens came from their ranks."""
        return hidden_states if self._alone else super().combine_preprocess(hidden_states)

    def _maybe_dtoh_and_synchronize(
        self, point: str, tokens_per_expert: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        # Where probs are tells the device: core has moved the counts to the CPU after its first point, and
        # still has to wait for that copy at a later one.
        if self.probs.is_cuda:
            return super()._maybe_dtoh_and_synchronize(point, tokens_per_expert)
        if point == self.cuda_dtoh_point:
            for name in SPLITS:
                value = getattr(self, name)
                if isinstance(value, torch.Tensor):
                    setattr(self, name, value.numpy())
        return tokens_per_expert
