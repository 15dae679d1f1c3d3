"""Numbers as people read them."""

import pytest

from dsplugins.words import duration, operations, size


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.2, "0 s"), (59.6, "1 min 0 s"), (3700, "1 h 1 min"), (187200, "2 d 4 h")]
)
def test_durations(seconds, said):
    assert duration(seconds) == said


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (250_463e6, "250.5 GFLOP"),
        (999.96e9, "1 TFLOP"),
        (6.71e6, "6.71 MFLOP"),
        (4e4, "40 kFLOP"),
        (0.5e3, "0.5 kFLOP"),
    ],
)
def test_operations(count, said):
    assert operations(count) == said


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (0, "0 KiB"),
        (12 * 2**10, "12 KiB"),
        (2**20, "1.0 MiB"),
        (2**27, "0.12 GiB"),
        (2**34, "16.00 GiB"),
    ],
)
def test_sizes(count, said):
    assert size(count) == said
