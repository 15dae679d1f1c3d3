"""MLA's core attention through each kernel that torch may pick for it.

Shape legend: S sequence, B micro-batch, N heads, D head size of queries and keys (192), V of values (128).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from torch.nn.attention import SDPBackend, sdpa_kernel

from dsplugins.experiments.gpu_layer import Layer

OWN = "its own choice"
PATHS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "mem_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "math": SDPBackend.MATH,
}
"""Kernels behind torch's scaled_dot_product_attention, which `torch_local` calls on CUDA."""
HEADS = 8
"""Heads that the reference takes at once: V3's scores in FP32 are 67 MB a head."""


def inputs(layer: Layer) -> list[torch.Tensor]:
    """Queries and keys [S, B, N, D], values [S, B, N, V], and a gradient of the output [S, B, N * V]."""
    config = layer.settings.model
    length, batch, heads = (
        layer.plan.data.seq_length,
        layer.plan.train.micro_batch,
        config.num_attention_heads,
    )
    size = config.qk_head_dim + config.qk_pos_emb_head_dim
    shapes = [(heads, size), (heads, size), (heads, config.v_head_dim), (heads * config.v_head_dim,)]
    return [layer.noise(length, batch, *shape, seed=seed) for seed, shape in enumerate(shapes)]


def passes(core: Any, path: str, given: Sequence[torch.Tensor]) -> list[Any]:
    """Output and gradients of queries, keys and values, through `path`. Raises RuntimeError if it can't."""
    *tensors, gradient = given
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    with _through(path):
        output = core(*leaves, None, attn_mask_type=AttnMaskType.causal)
        output.backward(gradient)
    return [output.detach(), *(leaf.grad for leaf in leaves)]


@contextlib.contextmanager
def _through(path: str) -> Iterator[None]:
    with contextlib.nullcontext() if path == OWN else sdpa_kernel(PATHS[path]):
        yield


def reference(given: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """As `passes`, by torch's math kernel in FP32 on the same numbers, some heads at a time."""
    length, batch, heads, _ = given[0].shape
    given = [*given[:3], given[3].unflatten(-1, (heads, -1))]
    found = []
    for first in range(0, heads, HEADS):
        some = [t[:, :, first : first + HEADS].float().permute(1, 2, 0, 3) for t in given]
        query, key, value = leaves = [tensor.detach().requires_grad_() for tensor in some[:3]]
        with sdpa_kernel(SDPBackend.MATH):
            output = F.scaled_dot_product_attention(query, key, value, is_causal=True)
            output.backward(some[3])
        pieces: list[Any] = [output.detach(), *(leaf.grad for leaf in leaves)]
        found.append([piece.permute(2, 0, 1, 3) for piece in pieces])
    output, *gradients = [torch.cat(pieces, dim=2) for pieces in zip(*found, strict=True)]
    return [output.reshape(length, batch, -1), *gradients]


def errors(mine: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> dict[str, float]:
    """|mine - exact| / |exact| of the output and of the gradients."""
    names = ("output", "query_gradient", "key_gradient", "value_gradient")
    return {
        name: float((a.float() - b).norm() / b.norm()) for name, a, b in zip(names, mine, exact, strict=True)
    }
