"""The Triton casts: the reference's codes and scales to the bit, and code for Hopper made without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dsplugins.numerics.tiles import SMALLEST_AMAX, SMALLEST_GRADIENT, dequantise
from dsplugins.plugins.precision.fp8.reference import Reference
from dsplugins.plugins.precision.fp8.swiglu import SwigluKept

pytest.importorskip("triton")
REFERENCE = Reference()
SHAPES = [(70, 200), (1, 7), (33, 128), (130, 300)]
E5M6 = ["e5m6_pack_kernel", "e5m6_unpack_kernel"]
PAYLOAD = ["pack_kernel", "unpack_kernel"]
TO_E4M3 = [
    *("blocks_kernel", "columns_kernel", "rows_kernel"),
    *("swiglu_columns_kernel", "swiglu_rows_kernel"),
]
GRADIENT = ["swiglu_gradient_kernel"]


@pytest.fixture
def casts(interpreted):
    from dsplugins.plugins.precision.fp8.casts import TritonCasts

    return TritonCasts()


def drawn(*shape, seed=0, dtype=torch.bfloat16):
    """Numbers of many sizes, among them tiles of zeros, of subnormals, one with NaN and one with infinity."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-12, 6, shape[-1]).roll(seed)
    values = torch.randn(*shape, generator=generator) * sizes
    flat = values.view(-1, shape[-1])
    flat[0] = 0
    flat[len(flat) // 2] *= 1e-32
    flat[-1, 0], flat[-1, -1] = torch.nan, -torch.inf
    return values.to(dtype)


def same(got, expected):
    """Codes and scales equal in every bit, where NaN is NaN."""
    assert got.tile == expected.tile and got.codes.shape == expected.codes.shape
    assert torch.equal(got.scales.nan_to_num(-1.0), expected.scales.nan_to_num(-1.0))
    one, other = got.codes.float(), expected.codes.float()
    assert torch.equal(one.isnan(), other.isnan())
    assert torch.equal(one.nan_to_num(0.0), other.nan_to_num(0.0))


@pytest.mark.parametrize("tokens, channels", SHAPES)
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows(casts, tokens, channels, power_of_two, dtype):
    x = drawn(tokens, channels, dtype=dtype)
    for smallest in (SMALLEST_AMAX, SMALLEST_GRADIENT):
        same(casts.rows(x, power_of_two, smallest), REFERENCE.rows(x, power_of_two, smallest))


@pytest.mark.parametrize("smallest", [SMALLEST_AMAX, SMALLEST_GRADIENT])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_scales_and_codes_of_every_number_of_bf16(casts, power_of_two, smallest, monkeypatch):
    """A division is made of products and their remainders: here by every largest number that a tile can have,
    of a number a third as large, too.
    """
    import dsplugins.plugins.precision.fp8.casts as starts

    monkeypatch.setattr(starts, "TOKENS", {"rows_kernel": 4096})
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = torch.stack([every, (every.float() / 3).bfloat16()], dim=1)
    same(casts.rows(x, power_of_two, smallest), REFERENCE.rows(x, power_of_two, smallest))


SPLITS = [70, 0, 130, 1]


@pytest.mark.parametrize("channels", [200, 7])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_columns_of_each_expert(casts, channels, power_of_two):
    """From numbers, and from the codes that forward kept; what fills a run up to whole tiles is zero."""
    x = drawn(sum(SPLITS), channels)
    for given, by_reference in ((x, x), (casts.rows(x, True), REFERENCE.rows(x, True))):
        found = casts.columns(given, SPLITS, power_of_two, SMALLEST_GRADIENT)
        expected = REFERENCE.columns(by_reference, SPLITS, power_of_two, SMALLEST_GRADIENT)
        assert len(found) == len(expected) == len(SPLITS)
        for run, (one, other) in enumerate(zip(found, expected, strict=True)):
            same(one, other)
            beyond = found.filled(run).codes[:, SPLITS[run] :].float()
            assert beyond.shape[1] == -SPLITS[run] % 128 and not beyond.nan_to_num(0.0).any()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_blocks(casts, transposed, power_of_two):
    weight = drawn(3, 150, 260)
    found = casts.blocks(weight, power_of_two, transposed)
    same(found, REFERENCE.blocks(weight, power_of_two, transposed))
    assert found.codes.is_contiguous()


@pytest.mark.parametrize("tokens, channels", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_e5m6_there_and_back(casts, tokens, channels, dtype):
    """Down to its subnormals; the bytes of NaN are any NaN's."""
    x = drawn(tokens, channels, dtype=dtype)
    found, expected = casts.pack(x), REFERENCE.pack(x)
    assert torch.equal(found.scales.nan_to_num(-1.0), expected.scales.nan_to_num(-1.0))
    back, wanted = casts.unpack(found), REFERENCE.unpack(expected)
    assert back.dtype == torch.bfloat16 and torch.equal(back.isnan(), wanted.isnan())
    assert torch.equal(back.nan_to_num(0.0), wanted.nan_to_num(0.0))
    whole = ~wanted.isnan().any(dim=1)
    assert torch.equal(found.bytes[whole], expected.bytes[whole])


@pytest.mark.parametrize("bits", [0x7FFF, 0x7FC0, -0x0001, 0x7F81])
def test_any_nan_is_one_in_e5m6(casts, bits):
    """CUDA's own has all bits set, a CPU's has one: neither runs into the number beside it."""
    x = torch.ones(2, 128, dtype=torch.bfloat16)
    x.view(torch.int16)[0, 5] = bits
    found = casts.pack(x)
    found.scales[0] = 1.0  # so that only the code says what it is
    back = casts.unpack(found)
    assert back[0, 5].isnan() and back[0].isnan().sum() == 128 and not back[1].isnan().any()


@pytest.mark.parametrize("with_probs", [False, True])
def test_swiglu_in_one(casts, with_probs):
    """An exponential's last digit may round a number of BF16 the other way: a code in a thousand may differ
    by one step."""
    generator = torch.Generator().manual_seed(0)
    inner = torch.randn(70, 2 * 200, generator=generator).bfloat16() * 3
    probs = torch.rand(70, generator=generator) if with_probs else None
    found, expected = (one.swiglu_rows(inner, probs, False) for one in (casts, REFERENCE))
    a, b = dequantise(found), dequantise(expected)
    assert (found.codes.float() != expected.codes.float()).float().mean() < 1e-3
    assert ((a - b).abs() <= b.abs() / 8 + 1e-6).all()


def kept(tokens, channels, with_probs, dtype=torch.bfloat16):
    """SwiGLU's input as backward has it, the last token without a number."""
    generator = torch.Generator().manual_seed(0)
    inner = torch.randn(tokens, 2 * channels, generator=generator) * 3
    inner[-1, 0] = torch.nan
    probs = torch.rand(tokens, generator=generator) if with_probs else None
    return SwigluKept(REFERENCE.rows(inner.to(dtype), True), probs, dtype)


@pytest.mark.parametrize("with_probs", [False, True])
@pytest.mark.parametrize("channels", [256, 72])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_swiglu_again_in_columns(casts, channels, with_probs, dtype):
    """From codes to codes; with 72 channels a tile has gates and ups, and the parts are done in turn."""
    given = kept(sum(SPLITS), channels, with_probs, dtype)
    found = casts.swiglu_columns(given, SPLITS, False)
    expected = REFERENCE.swiglu_columns(given, SPLITS, False)
    for one, other in zip(found, expected, strict=True):
        a, b = dequantise(one), dequantise(other)
        assert a.shape == b.shape and torch.equal(a.isnan(), b.isnan())
        a, b = a.nan_to_num(0.0), b.nan_to_num(0.0)
        other_codes = one.codes.float().nan_to_num(0.0) != other.codes.float().nan_to_num(0.0)
        assert a.numel() == 0 or other_codes.float().mean() < 5e-3
        assert ((a - b).abs() <= b.abs() / 8 + 1e-6).all()


@pytest.mark.parametrize("with_probs", [False, True])
@pytest.mark.parametrize("channels", [256, 72])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_way_back_of_swiglu(casts, channels, with_probs, dtype):
    given = kept(70, channels, with_probs, dtype)
    dy = drawn(70, channels, seed=3).nan_to_num(0.0, 1.0, -1.0).to(dtype)
    for one, other in zip(
        casts.swiglu_gradient(given, dy), REFERENCE.swiglu_gradient(given, dy), strict=True
    ):
        if other is None:
            assert one is None and not with_probs
            continue
        assert one.dtype == other.dtype and one.isnan().any()
        near = 1e-2 if other.dtype == torch.bfloat16 else 1e-4
        size = float(other.nan_to_num(0.0).abs().mean())
        torch.testing.assert_close(one, other, rtol=near, atol=near * size, equal_nan=True)


def test_nothing_for_no_tokens(casts):
    empty = torch.zeros(0, 256, dtype=torch.bfloat16)
    assert casts.rows(empty, False).codes.shape == (0, 256)
    assert [one.codes.shape for one in casts.columns(empty, [0, 0], False)] == [(256, 0), (256, 0)]
    assert casts.swiglu_rows(empty, None, False).codes.shape == (0, 128)
    assert casts.unpack(casts.pack(empty)).shape == (0, 256)


def test_all_compile_for_hopper_without_one(tmp_path):
    """Down to a binary, by the assembler that comes with Triton; the cast is Hopper's own instruction."""
    script = Path(__file__).parents[3] / "hopper" / "compile_kernels.py"
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert sorted(made) == sorted([*TO_E4M3, *E5M6, *GRADIENT, *PAYLOAD])
    for name, form in ((name, form) for name, forms in made.items() for form in forms):
        assert ("cvt.rn.satfinite.e4m3x2.f32" in form["ptx"]) == (name in (*TO_E4M3, "pack_kernel"))
        assert ".target sm_90" in form["ptx"]
        assert form["cubin_bytes"] > 1000
        if form["aligned"]:  # the payload has one exponent for 128 codes
            alone = form["ptx"].count("st.global.b8")
            assert alone == (name == "pack_kernel"), f"{name} stores bytes one by one"
