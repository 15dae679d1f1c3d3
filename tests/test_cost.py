"""Arithmetic of cost against the published numbers (oracle O9)."""

from __future__ import annotations

import pytest

from dsplugins.cost import Bill, TokenWork, tokens_of

HOUR, DAY = 3600.0, 86400.0


def test_table_1_of_the_report():
    """14.8T tokens at 180K GPU-hours a trillion: 2664K; with 119K and 5K more 2788K, $5.576M at $2."""
    a_trillion = Bill(10**12, 10**12 / (180e3 / 2048 * HOUR), 2048)
    assert a_trillion.gpu_hours == pytest.approx(180e3)
    assert a_trillion.seconds / DAY == pytest.approx(3.7, abs=0.05)
    whole = Bill(148 * 10**11, a_trillion.tokens_per_second, 2048)
    assert whole.gpu_hours == pytest.approx(2664e3) and whole.price(2.0) == pytest.approx(5.328e6)
    more = [Bill(1, 1 / (hours * HOUR), 1) for hours in (119e3, 5e3)]
    assert sum(bill.gpu_hours for bill in (whole, *more)) == pytest.approx(2788e3)
    assert sum(bill.price(2.0) for bill in (whole, *more)) == pytest.approx(5.576e6)


def test_a_step_of_the_report_is_the_published_day():
    """15360 x 4096 tokens in 19.926 s are 272.80B tokens a day (arXiv 2505.09343, table 4)."""
    step = 15360 * 4096
    assert Bill(step, step / 19.926, 2048).tokens_per_second * DAY == pytest.approx(272.80e9, rel=1e-4)


def test_a_day_of_serving():
    """226.75 nodes of eight at $2 a GPU-hour, 776B tokens in 24 hours: $87,072 (inference overview)."""
    tokens = 608 * 10**9 + 168 * 10**9
    day = Bill(tokens, tokens / DAY, 226.75 * 8)
    assert day.price(2.0) == pytest.approx(87_072) and day.gpu_hours == pytest.approx(226.75 * 8 * 24)


def test_operations_of_a_sequence_added_up():
    """Query by query, forward and backward."""
    work = TokenWork(weights=7, pairs=3, sequence=5)
    causal = sum(2 * 3 * (7 + 3 * keys) for keys in range(1, 6)) / 5
    assert work.causal == causal and work.unmasked == 2 * 3 * (7 + 3 * 5)
    bill = Bill.at(100.0, 1000, work, 4)
    assert bill.tokens_per_second * work.causal == pytest.approx(4 * 100.0)
    assert bill.seconds == pytest.approx(1000 * work.causal / 400)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["train.steps=3"], 3 * 8 * 32),
        (["train.steps=null", "train.tokens=600"], 3 * 8 * 32),  # whole steps of 256 tokens
        (["train.steps=null", "train.tokens=512"], 2 * 8 * 32),
        (
            ["train.steps=4", "train.global_batch=[{until: 2 steps, value: 2}, {value: 6}]"],
            (2 + 2 + 6 + 6) * 32,
        ),
    ],
)
def test_tokens_of_a_run_are_those_of_its_steps(overrides, expected):
    from pathlib import Path

    from dsplugins.plan import prepare
    from dsplugins.recipe import Recipe

    tiny = Path(__file__).parent / "tiny.yaml"
    assert tokens_of(prepare(Recipe.load(tiny, overrides))[1]) == expected
