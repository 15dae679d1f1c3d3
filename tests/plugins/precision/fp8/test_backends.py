"""Backends for Hopper over stand-ins for its products: interpreted casts, real layouts, known numbers.

What only a GPU can tell (the products themselves, speed) is in tests/gpu.
"""

from __future__ import annotations

import pytest
import torch
from fp8_layers import SPLITS, TOKENS, alike, drawn, errors, through

from dsplugins.numerics.tiles import dequantise
from dsplugins.plugins.precision.fp8.experts import ExpertsUp, SwigluDown
from dsplugins.plugins.precision.fp8.linear import Fp8Product
from dsplugins.plugins.precision.fp8.reference import Reference
from dsplugins.plugins.precision.fp8.rule import Rule


def scaled_mm(a, b, scale_a, recipe_a, scale_b, recipe_b, output_dtype):
    """`torch.nn.functional.scaled_mm` for Hopper's tiles in FP32, with what ATen's ScaledBlas.cpp demands."""
    from torch.nn.functional import ScalingType

    (m, k), n, tiles = a.shape, b.shape[1], -(-a.shape[1] // 128)
    assert a.dtype == b.dtype == torch.float8_e4m3fn and k % 16 == 0 and n % 16 == 0
    assert m % 8 == 0, "TransformerEngine's cublaslt_gemm.cu: of the operand whose rows have their own scales"
    assert a.stride(1) == 1 and b.stride(0) == 1, "row-major times column-major"
    assert recipe_a == ScalingType.BlockWise1x128
    assert scale_a.shape == (m, tiles) and scale_a.stride(0) == 1
    assert scale_a.stride(1) == m or (tiles == 1 and scale_a.stride(1) == 1)
    left = a.float() * scale_a.repeat_interleave(128, 1)[:, :k]
    if recipe_b == ScalingType.BlockWise128x128:
        fours = -(-tiles // 4) * 4
        assert scale_b.shape == (fours, -(-n // 128)) and scale_b.stride(0) == 1
        assert scale_b.stride(1) == fours or (scale_b.shape[1] == 1 and scale_b.stride(1) == 1)
        spread = scale_b[:tiles].repeat_interleave(128, 1)[:, :n]
    else:
        assert scale_b.shape == (n, tiles) and scale_b.stride(0) == 1
        assert scale_b.stride(1) == n or (tiles == 1 and scale_b.stride(1) == 1)
        spread = scale_b.t()
    return (left @ (b.float() * spread.repeat_interleave(128, 0)[:k])).to(output_dtype)


@pytest.fixture(params=["torch", "deepgemm"])
def arithmetic(request, interpreted, monkeypatch):
    if request.param == "deepgemm":
        request.getfixturevalue("deep_gemm")
        from dsplugins.plugins.precision.fp8.deep_gemm import DeepGemm

        return DeepGemm()
    from dsplugins.plugins.precision.fp8 import scaled_mm as module

    monkeypatch.setattr(module, "scaled_mm", scaled_mm)
    return module.ScaledMm()


@pytest.mark.parametrize("tokens", [1, 77, 256])
def test_a_linear_is_the_reference_s(arithmetic, tokens):
    leaves = drawn(tokens, 208), drawn(144, 208, seed=1)
    results = [through(Fp8Product, leaves, Rule(one), None, None) for one in (arithmetic, Reference())]
    alike(*results)


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("inputs", [96, 128, 144])
def test_experts_are_the_reference_s(arithmetic, power_of_two, inputs):
    """Ragged runs of tokens, one of them empty; one tile of inputs, less than one, and more."""
    leaves = drawn(TOKENS, inputs), drawn(4, 160, inputs, seed=1)
    rules = [Rule(one, power_of_two, power_of_two) for one in (arithmetic, Reference())]
    alike(*(through(ExpertsUp, leaves, SPLITS, rule) for rule in rules))


@pytest.mark.parametrize("inputs", [128, 144])
def test_the_down_projection_is_the_reference_s(arithmetic, inputs):
    """Through SwiGLU and the codes that it keeps, where a last digit of the exponential counts, too."""
    probs = torch.rand(TOKENS, generator=torch.Generator().manual_seed(3))
    leaves = drawn(TOKENS, 2 * inputs), probs, drawn(4, 160, inputs, seed=1)
    found, expected = (through(SwigluDown, leaves, SPLITS, Rule(one)) for one in (arithmetic, Reference()))
    assert max(errors(found, expected)) < 1e-3


def test_what_is_not_a_number_shows_in_every_product(arithmetic):
    """NaN and infinity of one token: in its output, its input gradient and its weight's gradient, and nowhere
    else's."""
    x, weight = drawn(80, 144), drawn(160, 144, seed=1)
    x[3, 5], x[4, 6] = torch.nan, torch.inf
    y, dx, dw = through(Fp8Product, (x, weight), Rule(arithmetic), None, None)
    assert (~y.isfinite()).any(1).nonzero().flatten().tolist() == [3, 4]
    assert not dw[:, 5].isfinite().any() and not dw[:, 6].isfinite().any()
    assert dx.isfinite().all(), "the gradient of the input doesn't depend on it"


def test_a_gradient_that_is_not_a_number_shows(arithmetic):
    x, weight = drawn(80, 144).requires_grad_(), drawn(160, 144, seed=1).requires_grad_()
    dy = drawn(80, 160, seed=2)
    dy[7, 9] = torch.nan
    Fp8Product.apply(x, weight, Rule(arithmetic), None, None).backward(dy)
    assert (~x.grad.isfinite()).any(1).nonzero().flatten().tolist() == [7]
    assert (~weight.grad.isfinite()).any(1).nonzero().flatten().tolist() == [9]


def test_nothing_for_no_tokens(arithmetic):
    """An expert-parallel rank whose experts nobody chose."""
    leaves = drawn(0, 144), drawn(2, 160, 144, seed=1)
    y, dx, dw = through(ExpertsUp, leaves, [0, 0], Rule(arithmetic))
    assert y.shape == (0, 160) and dx.shape == (0, 144) and not dw.any()


def test_experts_are_one_call_each_way_of_deepgemm(interpreted, deep_gemm):
    """And one for the weight gradient of each that has tokens."""
    from dsplugins.plugins.precision.fp8.deep_gemm import DeepGemm

    through(ExpertsUp, (drawn(TOKENS, 144), drawn(4, 160, 144, seed=1)), SPLITS, Rule(DeepGemm()))
    busy = sum(split > 0 for split in SPLITS)
    assert ["m_grouped", "m_grouped", *["fp8_gemm_nt, both in rows"] * busy] == deep_gemm.CALLS


def test_runs_lie_one_after_the_other(interpreted):
    """What `columns` promises: as a sequence the reference's matrices, and nothing beyond the last."""
    from dsplugins.plugins.precision.fp8.casts import TritonCasts

    x = drawn(TOKENS, 144)
    found = TritonCasts().columns(x, SPLITS, False)
    expected = Reference().columns(x, SPLITS, False)
    assert found.lengths == [128, 0, 256, 128]
    assert [dequantise(one).tolist() for one in found[:]] == [dequantise(one).tolist() for one in expected]
    with pytest.raises(IndexError):
        found[4]
