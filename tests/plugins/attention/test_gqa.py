"""Grouped-query attention against its definition."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from dsplugins.plugins.attention.gqa import Gqa

SEQUENCE, BATCH = 10, 2


def rotate(x: torch.Tensor, base: float) -> torch.Tensor:
    """RoPE that pairs element i with i + D/2; [S, B, D] in float64."""
    half = x.shape[-1] // 2
    angle = torch.arange(len(x), dtype=torch.float64)[:, None] * base ** (
        -torch.arange(half, dtype=torch.float64) / half
    )
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    first, second = x.split(half, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def explicit(qkv: torch.Tensor, proj: torch.Tensor, hidden: torch.Tensor, groups: int, per_group: int):
    """[S, B, H] -> [S, B, H], head by head; megatron stores each group's queries, then its key and value."""
    dim = qkv.shape[0] // (groups * (per_group + 2))
    future = torch.ones(len(hidden), len(hidden)).triu(1).bool()
    heads = []
    for group in (hidden @ qkv.T).unflatten(-1, (groups, per_group + 2, dim)).unbind(2):
        *queries, key, value = group.unbind(2)
        for query in queries:
            scores = torch.einsum("sbd,tbd->bst", rotate(query, 10000), rotate(key, 10000)) / math.sqrt(dim)
            weights = scores.masked_fill(future, -math.inf).softmax(-1)
            heads.append(torch.einsum("bst,tbd->sbd", weights, value))
    return torch.cat(heads, -1) @ proj.T


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_equals_the_definition(single, groups):
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from megatron.core.transformer.spec_utils import build_module
    from oracles.tiny import tiny_config

    from dsplugins.plugins.backend.torch_local import TorchLocal

    config = tiny_config(multi_latent_attention=False, qk_layernorm=False, num_query_groups=groups)
    spec = Gqa().ds_attention(config, TorchLocal().ds_backend(config))
    attention = build_module(spec, config=config, layer_number=1)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, 0, 0.1)
    hidden = torch.randn(SEQUENCE, BATCH, 64, generator=torch.Generator().manual_seed(3))
    rotary = RotaryEmbedding(config.kv_channels, 1.0, use_cpu_initialization=True)(SEQUENCE)
    output, _ = attention(hidden, None, rotary_pos_emb=rotary)
    (output**2).mean().backward()

    names = ("linear_qkv", "linear_proj")
    exact = [getattr(attention, n).weight.detach().double().requires_grad_() for n in names]
    expected = explicit(*exact, hidden.double(), groups, 4 // groups)
    (expected**2).mean().backward()
    assert (output - expected).abs().max() < 1e-5 * expected.std()
    for name, weight in zip(names, exact, strict=True):
        gradient = getattr(attention, name).weight.grad
        assert (gradient - weight.grad).norm() < 1e-5 * weight.grad.norm(), name


def test_rotates_inside_the_model(single):
    """GPTModel makes the angles. In a single layer without them, the order of earlier tokens is not seen."""
    from oracles.tiny import build_tiny, tiny_config, tokens

    sizes = {"num_layers": 1, "moe_layer_freq": [0]}
    config = tiny_config(multi_latent_attention=False, qk_layernorm=False, **sizes)
    model = build_tiny(config, Gqa()).eval()
    for parameter in model.decoder.layers.parameters():
        torch.nn.init.normal_(parameter, float(parameter.ndim == 1), 0.1)
    ids, positions = tokens(batch=1)
    swapped = ids.clone()
    swapped[:, [2, 3]] = ids[:, [3, 2]]
    assert ids[0, 2] != ids[0, 3]
    apart = model(ids, positions, None)[:, -1] - model(swapped, positions, None)[:, -1]
    assert apart.abs().max() > 1e-4


def problems(tensor: int = 1, rope_type: str = "rope", heads: int = 4, groups: int = 4) -> list[str]:
    config = SimpleNamespace(num_attention_heads=heads, num_query_groups=groups)
    plan = SimpleNamespace(model={"rope_type": rope_type}, layout=SimpleNamespace(tensor=tensor))
    return [problem.message for problem in Gqa().ds_check(plan, SimpleNamespace(model=config))]


def test_problems():
    assert problems() == []
    assert "num_query_groups=3" in problems(groups=3)[0]
    assert problems(2, groups=1) == ["parallel.tensor=2 does not divide model.num_query_groups=1"]
    assert "yarn" in problems(rope_type="yarn")[0]
