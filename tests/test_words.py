"""Numbers as people read them."""

import pytest

from dsplugins.words import duration, size


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.2, "0 s"), (59.6, "1 min 0 s"), (3700, "1 h 1 min"), (187200, "2 d 4 h")]
)
def test_durations(seconds, said):
    assert duration(seconds) == said


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
