"""Torch's random numbers as a function of the step: a run that goes on draws what it would have drawn.

The host draws none in a step; plugins may.
"""

from __future__ import annotations

import hashlib

import torch
from megatron.core import parallel_state, tensor_parallel


def seed(train_seed: int, step: int, what: str = "step") -> None:
    """Seed torch's generators and megatron-core's tracker of them for `what` of `step` on this rank.

    The default generator draws the same on the ranks of a tensor-parallel group, and something else on each
    data-parallel rank and pipeline stage; the tracker's states are core's own (random.py).
    """
    data = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    place = f"{train_seed} {what} {step} {data} {parallel_state.get_pipeline_model_parallel_rank()}"
    number = int.from_bytes(hashlib.blake2b(place.encode(), digest_size=7).digest())
    tensor_parallel.model_parallel_cuda_manual_seed(number)  # the device's default generator, too
    torch.default_generator.manual_seed(number)  # torch.manual_seed goes through devices that nobody has


__all__ = ["seed"]
