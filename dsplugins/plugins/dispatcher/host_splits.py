"""megatron-core's all-to-all dispatcher, also where there is no device to wait for."""

from __future__ import annotations

import torch
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

SPLITS = ("input_splits", "output_splits", "output_splits_tp")


class AllToAllDispatcher(MoEAlltoAllTokenDispatcher):
    """Stock on CUDA. On CPU core leaves split sizes as tensors, which no all-to-all takes: lists here."""

    def _maybe_dtoh_and_synchronize(
        self, point: str, tokens_per_expert: torch.Tensor | None = None
    ) -> torch.Tensor:
        if tokens_per_expert is None or tokens_per_expert.is_cuda:
            return super()._maybe_dtoh_and_synchronize(point, tokens_per_expert)
        if point == self.cuda_dtoh_point:
            for name in SPLITS:
                value = getattr(self, name, None)
                if isinstance(value, torch.Tensor) and not value.is_cuda:
                    setattr(self, name, value.tolist())
        return tokens_per_expert
