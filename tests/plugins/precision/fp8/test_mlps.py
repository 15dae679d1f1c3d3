"""MLPs of a model under fp8_v3: what each keeps for backward, its numbers beside the report's in NumPy."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import report_fp8 as report
from runs import SEQUENTIAL

FP8 = ["plugins.fp32=null", "plugins.fp8_v3.outside=fp32"]
TOKENS, HIDDEN = 24, 160
WIDTHS = {"dense": 200, "shared": 48, "routed": 136}
SIZES = [
    *(f"model.hidden_size={HIDDEN}", "model.num_attention_heads=2"),
    f"model.ffn_hidden_size={WIDTHS['dense']}",
    f"model.moe_shared_expert_intermediate_size={WIDTHS['shared']}",
    f"model.moe_ffn_hidden_size={WIDTHS['routed']}",
    *SEQUENTIAL,
]
"""Tiles of 128 and what is left beside them, in each."""


def mlp_of(chunk, which):
    dense, moe = (chunk.decoder.layers[layer].mlp for layer in (0, 1))
    return {"dense": dense, "shared": moe.shared_experts, "routed": moe.experts.local_experts[0]}[which]


def held(kept):
    """Bytes of the memory behind tensors, each once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}.values())


@contextlib.contextmanager
def keeping(kept):
    """Notes what autograd keeps meanwhile."""
    import torch

    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        yield


def passed(which, overrides):
    """One pass of TOKENS through an MLP: bytes kept, operands, output and gradients."""
    import torch
    from built import tiny_model

    with tiny_model(*FP8, *SIZES, *overrides) as (_, _, _, (chunk,)):
        mlp, kept = mlp_of(chunk, which), []
        up, down = mlp.linear_fc1.weight, mlp.linear_fc2.weight
        generator = torch.Generator().manual_seed(0)
        x, dy = (torch.randn(TOKENS, HIDDEN, generator=generator) for _ in range(2))
        probs = torch.rand(TOKENS, generator=generator)
        x.requires_grad_()
        with keeping(kept):
            y = mlp(x, per_token_scale=probs) if which == "routed" else mlp(x.unsqueeze(1))
        y = (y[0] if isinstance(y, tuple) else y).view(TOKENS, HIDDEN)
        y.backward(dy)
        given = x, probs if which == "routed" else torch.ones(TOKENS), up, down, dy
        found = y, x.grad, up.grad, down.grad
        return held(kept), *([t.detach().numpy() for t in ts] for ts in (given, found))


@pytest.mark.parametrize("which", WIDTHS)
def test_an_mlp_keeps_its_input_and_swiglus_in_a_byte_a_number(workers, which):
    """And a scale for each 128; a routed expert the router's weight, besides."""
    kept, *_ = workers(1).run(passed, which, [])[0]
    token = sum(width + 4 * -(-width // 128) for width in (HIDDEN, 2 * WIDTHS[which]))
    assert kept == TOKENS * (token + 4 * (which == "routed"))


def expected(x, probs, up, down, dy, which):
    """Output and gradients in float64, the procedure's roundings at each product."""
    routed = which == "routed"
    inner = report.coded(x, 1, 128, routed) @ report.coded(up, 128, 128).T
    y, dactive, kept, dw = report.down(inner, probs, down, dy, gradient_po2=routed)
    gate, rest = np.split(kept, 2, axis=-1)
    share, dactive = report.sigmoid(gate), dactive * probs[:, None]
    dgate = dactive * rest * share * (1 + gate * (1 - share))
    _, dx, dup = report.linear(x, up, np.concatenate([dgate, dactive * gate * share], -1), input_po2=routed)
    return y, dx, dup, dw


@pytest.mark.parametrize("which", WIDTHS)
def test_an_mlp_is_the_reports_procedure(workers, which):
    """Forward and backward, each product's operands rounded as the report says."""
    _, given, found = workers(1).run(passed, which, [])[0]
    for got, want in zip(found, expected(*given, which), strict=True):
        assert report.difference(got, want) < 1e-9
