"""Arithmetic of cost against the published numbers (oracle O9)."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsplugins.cost import Bill, TokenWork, tokens_of

DAY = 86400.0
V3 = TokenWork(weights=36_625_603_584, pairs=61 * 128 * (192 + 128), sequence=4096)
RATE = 272.80e9 / DAY / 2048
"""Tokens a second on each of 2048 GPUs (arXiv 2505.09343, table 4)."""


def planned(recipe, *overrides):
    from dsplugins.plan import prepare
    from dsplugins.recipe import Recipe

    return prepare(Recipe.load(recipe, list(overrides)))[1]


def test_operations_of_a_sequence_added_up():
    """Query by query, forward and backward."""
    work = TokenWork(weights=7, pairs=3, sequence=5)
    assert work.causal == sum(2 * 3 * (7 + 3 * keys) for keys in range(1, 6)) / 5
    assert work.unmasked == 2 * 3 * (7 + 3 * 5)


def test_operations_are_the_published_ones():
    """arXiv 2505.09343: 250 GFLOP a token (table 2), 385 and 432 TFLOP/s (table 4)."""
    assert V3.causal == pytest.approx(250e9, rel=2.5e-3)
    assert V3.causal * RATE == pytest.approx(385e12, rel=4e-3)
    assert V3.unmasked * RATE == pytest.approx(432e12, rel=4e-3)


def test_the_recipe_s_training_costs_what_was_published():
    """Report, table 1: 2664 thousand GPU-hours, $5.328M at $2, 180 thousand hours or 3.7 days a trillion."""
    bill = Bill(tokens_of(planned("deepseek_v3/v3_671b.yaml")), RATE, 2048)
    assert bill.tokens == pytest.approx(14.8e12, rel=1e-5)
    assert bill.hours == pytest.approx(2664e3, rel=2e-3)
    assert bill.price(2.0) == pytest.approx(5.328e6, rel=2e-3)
    assert bill.hours / bill.tokens * 1e12 == pytest.approx(180e3, rel=2e-3)
    assert bill.seconds / DAY / bill.tokens * 1e12 == pytest.approx(3.7, abs=0.05)
    # With the 119 and 5 thousand hours of what came after pre-training.
    assert (bill.hours + 119e3 + 5e3) * 2.0 == pytest.approx(5.576e6, rel=2e-3)


def test_a_step_of_the_recipe_takes_as_long_as_published():
    """19.926 s for a step of the largest batch (table 4)."""
    plan = planned("deepseek_v3/v3_671b.yaml")
    batch = max(plan.train.global_batch.distinct(128))
    assert Bill(batch * plan.data.seq_length, RATE, 2048).seconds == pytest.approx(19.926, rel=1e-3)


def test_a_day_of_serving():
    """226.75 nodes of eight at $2 a GPU-hour: $87,072 a day for 776B tokens (inference overview)."""
    tokens, gpus = 608 * 10**9 + 168 * 10**9, 1814
    day = Bill(tokens, tokens / DAY / gpus, gpus)
    assert day.seconds == pytest.approx(DAY) and day.price(2.0) == pytest.approx(87_072)


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.steps=3"],
        ["train.steps=null", "train.tokens=600"],  # whole steps of 256 tokens
        ["train.steps=null", "train.tokens=512"],
        ["train.steps=9", "train.global_batch=[{until: 2 steps, value: 2}, {value: 6}]"],
        ["train.steps=9", "train.global_batch=[{until: 4 steps, from: 2, to: 7}]"],
        ["train.steps=3", "train.global_batch=[{until: 4 steps, from: 2, to: 7}]"],
        [
            "train.steps=null",
            "train.tokens=9000",
            "train.global_batch=[{until: 2000, from: 1, to: 9}, {value: 3}]",
        ],
    ],
)
def test_tokens_of_a_run_are_those_of_its_steps(overrides):
    """As the loop takes them, one after the other."""
    plan = planned(Path(__file__).parent / "tiny.yaml", "train.micro_batch=1", *overrides)
    steps = tokens = 0
    while not plan.train.over(steps, tokens):
        tokens += plan.train.global_batch.at_multiple(steps, tokens, plan.train.multiple(1)) * 32
        steps += 1
    assert tokens_of(plan) == tokens > 0


def test_a_run_of_very_many_steps_is_not_walked():
    plan = planned(Path(__file__).parent / "tiny.yaml", "train.steps=null", "train.tokens=14800000000000")
    assert tokens_of(plan) == 14_800_000_000_000
