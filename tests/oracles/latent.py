"""Latent attention written out from the report's equations, head by head in float64."""

from __future__ import annotations

import math
from typing import Any

import torch


def rotate(x: torch.Tensor, base: float) -> torch.Tensor:
    """RoPE of interleaved pairs, x0 + i x1 times exp(i p f); [S, ..., D] in float64."""
    dim = x.shape[-1]
    frequency = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = torch.arange(x.shape[0], dtype=torch.float64)[:, None] * frequency
    turn = torch.polar(torch.ones_like(angle), angle)
    turn = turn.reshape(x.shape[0], *[1] * (x.ndim - 2), dim // 2)
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)


def rms(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    """RMSNorm over the last dimension."""
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * gain


def explicit(w: dict[str, torch.Tensor], hidden: torch.Tensor, config: Any) -> torch.Tensor:
    """arXiv 2412.19437, eq. 1-11, head by head in float64; [S, B, H] -> [S, B, H]."""
    nope, rope, value = config.qk_head_dim, config.qk_pos_emb_head_dim, config.v_head_dim
    latent, key_rope = (hidden @ w["linear_kv_down_proj"].T).split([config.kv_lora_rank, rope], -1)
    key_rope = rotate(key_rope, config.rotary_base)
    keys_values = rms(latent, w["kv_layernorm"]) @ w["linear_kv_up_proj"].T
    if config.q_lora_rank is None:
        queries = hidden @ w["linear_q_proj"].T
    else:
        queries = rms(hidden @ w["linear_q_down_proj"].T, w["q_layernorm"]) @ w["linear_q_up_proj"].T
    future = torch.ones(len(hidden), len(hidden)).triu(1).bool()
    heads = []
    for h in range(config.num_attention_heads):
        q = queries[..., h * (nope + rope) : (h + 1) * (nope + rope)]
        k_nope, v = keys_values[..., h * (nope + value) : (h + 1) * (nope + value)].split([nope, value], -1)
        q = torch.cat([q[..., :nope], rotate(q[..., nope:], config.rotary_base)], -1)
        k = torch.cat([k_nope, key_rope], -1)
        scores = torch.einsum("sbd,tbd->bst", q, k) / math.sqrt(nope + rope)
        heads.append(torch.einsum("bst,tbd->sbd", scores.masked_fill(future, -math.inf).softmax(-1), v))
    return torch.cat(heads, -1) @ w["linear_proj"].T


def weights_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The module's parameters by the names that `explicit` knows."""
    return {n.removesuffix(".weight"): p for n, p in module.named_parameters()}
