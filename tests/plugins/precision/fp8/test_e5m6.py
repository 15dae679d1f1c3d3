"""The 12-bit format of attention's output, against a table made from its definition."""

from __future__ import annotations

import numpy as np
import pytest
import report_fp8 as report
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsplugins.plugins.precision.fp8 import e5m6


def test_every_number_of_the_format_comes_back():
    values = torch.tensor([*report.E5M6, *-report.E5M6], dtype=torch.float32)
    assert values.max() == 65024 and values[1] == 2.0**-20 and len(report.E5M6) == 31 * 64
    rows = torch.nn.functional.pad(values, (0, 128 * 31 - len(values))).view(31, 128).clone()
    rows[:, -1] = 65024.0
    packed = e5m6.pack(rows)
    assert packed.bytes.shape == (31, 192) and torch.equal(packed.scales, torch.ones(31, 1))
    assert torch.equal(e5m6.unpack(packed), rows)


@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 300),
    magnitude=st.integers(-30, 30),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=40, deadline=None)
def test_rounds_to_the_nearest(rows, columns, magnitude, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator) * 2.0**magnitude
    x *= torch.exp2(torch.randint(-16, 1, x.shape, generator=generator).float())  # down to its subnormals
    got = e5m6.unpack(e5m6.pack(x))
    expected = report.coded(x.numpy(), 1, 128, True, report.E5M6)
    np.testing.assert_array_equal(got.double().numpy(), expected)


def test_three_bytes_for_two_numbers():
    packed = e5m6.pack(torch.randn(4, 129))
    assert packed.bytes.dtype == torch.uint8 and packed.bytes.shape == (4, 3 * 65)
    assert e5m6.unpack(packed).shape == (4, 129)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_surfaces(bad):
    x = torch.randn(2, 256)
    x[1, 130] = bad
    assert torch.isnan(e5m6.unpack(e5m6.pack(x)))[1, 130]
    assert torch.isfinite(e5m6.unpack(e5m6.pack(x))[0]).all()
