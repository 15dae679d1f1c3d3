"""megatron-core's all-to-all dispatcher, also where there is no device to wait for."""

from __future__ import annotations

import torch
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

SPLITS = ("input_splits", "output_splits", "output_splits_tp")


class AllToAllDispatcher(MoEAlltoAllTokenDispatcher):
    """Stock on CUDA. On the CPU, split sizes become NumPy arrays there too.

    Core makes them arrays while it copies them from the device (`maybe_move_tensor_to_cpu`) and leaves
    alone what is on the CPU already; no all-to-all takes tensors as sizes.
    """

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
