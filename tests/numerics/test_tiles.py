"""Oracle O3: E4M3 codes and scales, over shapes, magnitudes, zeros, subnormals, infinities and NaN."""

from __future__ import annotations

import numpy as np
import pytest
import report_fp8 as report
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsplugins.numerics.tiles import ROW, SQUARE, dequantise, quantise

TILES = pytest.mark.parametrize("tile", [ROW, SQUARE])


def matrix(rows, columns, magnitude, seed):
    generator = torch.Generator().manual_seed(seed)
    spread = torch.exp2(torch.randint(-4, 5, (rows, columns), generator=generator).float())
    return torch.randn(rows, columns, generator=generator) * spread * 2.0**magnitude


@given(
    rows=st.integers(1, 150),
    columns=st.integers(1, 300),
    magnitude=st.integers(-40, 40),
    power_of_two=st.booleans(),
    tile=st.sampled_from([ROW, SQUARE]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=40, deadline=None)
def test_is_what_the_report_says(rows, columns, magnitude, power_of_two, tile, seed):
    """Scales exactly; codes but for a millionth, and then by one code: here none differs."""
    x = matrix(rows, columns, magnitude, seed)
    x[x.abs() < 2.0 ** (magnitude - 3)] = 0.0
    quantised = quantise(x, tile, power_of_two)
    for i in range(quantised.scales.shape[0]):
        for j in range(quantised.scales.shape[1]):
            part = x[i * tile[0] : (i + 1) * tile[0], j * tile[1] : (j + 1) * tile[1]]
            assert quantised.scales[i, j].item() == report.scale(part.numpy(), 448.0, power_of_two)
    expected = report.coded(x.numpy(), *tile, power_of_two)
    np.testing.assert_array_equal(dequantise(quantised).double().numpy(), expected.astype(np.float32))


@given(
    rows=st.integers(1, 140),
    columns=st.integers(1, 270),
    odd=st.lists(
        st.tuples(
            st.integers(0, 10**6),
            st.sampled_from([float("nan"), float("inf"), -float("inf"), 0.0, 1e-42, -1e-40, 3e38]),
        ),
        max_size=6,
    ),
    power_of_two=st.booleans(),
    tile=st.sampled_from([ROW, SQUARE]),
)
@settings(max_examples=40, deadline=None)
def test_odd_numbers_anywhere(rows, columns, odd, power_of_two, tile):
    """What is not finite takes its tile with it and nothing else; subnormals and the largest do no harm."""
    x = matrix(rows, columns, 0, 7)
    for place, value in odd:
        x.view(-1)[place % x.numel()] = value
    back = dequantise(quantise(x, tile, power_of_two))
    for i in range(0, rows, tile[0]):
        for j in range(0, columns, tile[1]):
            part, got = (t[i : i + tile[0], j : j + tile[1]] for t in (x, back))
            if not part.isfinite().all():
                assert got.isnan().all()
                continue
            exact = part.double()
            bound = exact.abs() / 16 + float(exact.abs().max().clamp_min(1e-4)) / 448 * 2**-10 * 2
            assert ((got.double() - exact).abs() <= bound * (2 if power_of_two else 1)).all()


@TILES
def test_ragged_edges_have_tiles_of_their_own(tile):
    x = matrix(130, 200, 0, 1)
    scales = quantise(x, tile).scales
    assert scales.shape == (-(-130 // tile[0]), 2)
    assert scales[-1, 1] == x[128 if tile == SQUARE else 129 :, 128:].abs().max() / 448


def test_every_code_comes_back():
    """All finite E4M3 numbers in one tile whose scale is one."""
    numbers = torch.tensor([*report.E4M3, *-report.E4M3], dtype=torch.float32)
    x = torch.nn.functional.pad(numbers, (0, 256 - len(numbers))).view(2, 128)
    x[:, -1] = 448.0
    assert torch.equal(dequantise(quantise(x, ROW)), x)


def test_a_power_of_two_is_left_alone_and_others_go_up():
    x = torch.zeros(3, 128)
    x[0, 0], x[1, 0], x[2, 0] = 448.0 * 0.25, 448.0 * 0.26, 448.0 * 0.24
    assert quantise(x, ROW, power_of_two=True).scales.flatten().tolist() == [0.25, 0.5, 0.25]


@TILES
def test_zeros_and_the_smallest_numbers(tile):
    assert torch.equal(dequantise(quantise(torch.zeros(3, 130), tile)), torch.zeros(3, 130))
    tiny = torch.full((1, 128), 1e-42)  # a subnormal of float32
    assert quantise(tiny, tile).scales.item() == np.float32(1e-4) / np.float32(448)
    assert dequantise(quantise(tiny, tile)).abs().max() == 0


@TILES
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_surfaces(tile, bad):
    """The whole tile, and no other."""
    x = matrix(130, 260, 0, 2)
    x[1, 130] = bad
    lost = torch.isnan(dequantise(quantise(x, tile)))
    expected = torch.zeros_like(lost)
    expected[0 if tile == SQUARE else 1 : tile[0] if tile == SQUARE else 2, 128:256] = True
    assert torch.equal(lost, expected)
    assert torch.isnan(quantise(x, tile, power_of_two=True).codes.float())[1, 130]


def test_no_rows():
    empty = quantise(torch.zeros(0, 200), ROW)
    assert empty.codes.shape == (0, 200) and dequantise(empty).shape == (0, 200)
    assert quantise(torch.zeros(200, 0), ROW).scales.shape == (200, 0)
