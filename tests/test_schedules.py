"""Schedules: oracle O8 (DeepSeek-V3's own numbers), what is refused, and properties."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsplugins.recipe import Recipe
from dsplugins.schedules import Schedule, format_tokens, parse_tokens

B, T = 10**9, 10**12
LEARNING_RATE = [
    {"until": "2000 steps", "from": 0, "to": 2.2e-4},
    {"until": "10T", "value": 2.2e-4},
    {"until": "14.3T", "to": 2.2e-5, "shape": "cosine"},
    {"until": "14.633T", "value": 2.2e-5},
    {"value": 7.3e-6},
]
BATCH = [{"until": "469B", "from": 3072, "to": 15360}, {"value": 15360}]
GAMMA = [{"until": "14.3T", "value": 0.001}, {"value": 0}]
LAMBDA = [{"until": "10T", "value": 0.3}, {"value": 0.1}]

# (steps, tokens) -> learning rate, batch, gamma, lambda. 2000 steps of 3072 x 4096 tokens are 25B.
ORACLE = {
    (0, 0): (0.0, 3072, 0.001, 0.3),
    (1000, 0): (1.1e-4, 3072, 0.001, 0.3),
    (2000, 25 * B): (2.2e-4, 3072 + 12288 * 25 / 469, 0.001, 0.3),
    (12_000, 469 * B): (2.2e-4, 15360, 0.001, 0.3),
    (165_000, 10 * T - 1): (2.2e-4, 15360, 0.001, 0.3),
    (165_000, 10 * T): (2.2e-4, 15360, 0.001, 0.1),
    (200_000, 12_150 * B): (1.21e-4, 15360, 0.001, 0.1),
    (230_000, 14_300 * B - 1): (2.2e-5, 15360, 0.001, 0.1),
    (230_000, 14_300 * B): (2.2e-5, 15360, 0.0, 0.1),
    (240_000, 14_633 * B - 1): (2.2e-5, 15360, 0.0, 0.1),
    (240_000, 14_633 * B): (7.3e-6, 15360, 0.0, 0.1),
    (250_000, 14_800 * B): (7.3e-6, 15360, 0.0, 0.1),
}


@pytest.mark.parametrize("moment", ORACLE)
def test_o8_the_report_s_schedules(moment):
    found = [Schedule.parse(raw).at(*moment) for raw in (LEARNING_RATE, BATCH, GAMMA, LAMBDA)]
    assert found == pytest.approx(ORACLE[moment], rel=1e-12, abs=0)


@pytest.mark.parametrize("moment", ORACLE)
def test_o8_as_the_recipe_writes_them(moment):
    """The 671B recipe's own text follows the report at each of these moments."""
    recipe = Recipe.load("deepseek_v3/v3_671b.yaml")
    train, plugins = recipe.sections["train"], recipe.plugins
    written = [train["learning_rate"], train["global_batch"]]
    written += [plugins["aux_free"]["update_rate"], plugins["mtp"]["weight"]]
    found = [Schedule.parse(raw).at(*moment) for raw in written]
    assert found == pytest.approx(ORACLE[moment], rel=1e-12, abs=0)
    assert parse_tokens(train["tokens"]) == 14_800 * B


def test_cosine_is_not_linear():
    rate = Schedule.parse(LEARNING_RATE)
    quarter = rate.at(200_000, 10 * T + 4300 * B // 4)
    assert quarter == pytest.approx(2.2e-5 + 1.98e-4 * (1 + 2**-0.5) / 2)


@pytest.mark.parametrize(
    ("raw", "count"),
    [("14.8T", 14_800 * B), ("469B", 469 * B), ("14.633T", 14_633 * B), ("1.5K", 1500), ("2M", 2_000_000)]
    + [(7, 7), (1e12, T), ("25", 25), ("0", 0), ("1e3", 1000)],
)
def test_tokens_are_exact(raw, count):
    assert parse_tokens(raw) == count and isinstance(parse_tokens(raw), int)


@pytest.mark.parametrize(
    "raw", ["", "T", "14.8X", "-1B", "1.5", "1.0001K", None, True, [], "nan", float("inf"), "1e999999999"]
)
def test_what_is_no_count_of_tokens(raw):
    with pytest.raises(ValueError):
        parse_tokens(raw)


@given(st.integers(0, 10**18))
def test_formatted_tokens_are_read_back(count):
    assert parse_tokens(format_tokens(count)) == count


def test_a_schedule_without_open_end_holds_its_last_value():
    ramp = Schedule.parse([{"until": "10 steps", "from": 0, "to": 5}])
    assert [ramp.at(n, 0) for n in (0, 5, 10, 10**9)] == [0, 2.5, 5, 5]


def test_a_ramp_counts_from_the_phase_before_it():
    raw = [{"until": "10 steps", "value": 4}, {"until": "20 steps", "to": 0}, {"value": 1}]
    schedule = Schedule.parse(raw)
    assert [schedule.at(n, 10**15) for n in (9, 10, 15, 20)] == [4, 4, 2, 1]


def test_rounding_to_multiples():
    batch = Schedule.parse(BATCH)
    assert batch.at_multiple(0, 0, 1024) == 3072
    assert batch.at_multiple(0, 469 * B // 2, 1024) == 9216
    assert batch.at_multiple(0, 469 * B - 1, 1024) == 14336
    assert Schedule.constant(3).at_multiple(0, 0, 8) == 8
    assert Schedule.constant(0.3 * 10).at_multiple(0, 0, 1) == 3
    # 0.1 + 0.7 is a hair below 0.8: eight tenths all the same.
    assert Schedule.constant((0.1 + 0.7) * 10).at_multiple(0, 0, 1) == 8
    assert batch.distinct(1024) == list(range(3072, 15361, 1024))
    assert Schedule.constant(15).distinct(4) == [12]
    with pytest.raises(ValueError, match="multiple of 0"):
        batch.at_multiple(0, 0, 0)


def test_constants_and_how_they_look():
    assert Schedule.parse(3).is_constant and Schedule.parse(3) == Schedule.constant(3.0)
    assert Schedule.parse([{"until": 5, "value": 2}, {"value": 2}]).is_constant
    assert not Schedule.parse(BATCH).is_constant
    assert str(Schedule.constant(0.3)) == "0.3" and Schedule.constant(15360).to_raw() == 15360
    assert str(Schedule.parse(BATCH)) == "3072 to 15360 until 469B, then 15360"
    assert (Schedule.parse(BATCH).lowest, Schedule.parse(BATCH).highest) == (3072, 15360)


RAMP = {"until": 5, "from": 0, "to": 1}
REFUSED = {
    "not a number nor a list": "fast",
    "is not a number": True,
    "put the phase into": {"value": 3},
    "at least one phase": [],
    "is not a mapping": [3],
    "did you mean until": [{"untill": 3, "value": 1}],
    "finite number": [{"value": "1e-4"}],
    "value holds still": [{"until": 3, "value": 1, "to": 2}],
    "value holds": [{"value": 1, "shape": "cosine"}],
    "needs value, or to": [{"until": 3}],
    "needs until": [{"from": 0, "to": 1}],
    "neither linear nor cosine": [RAMP | {"shape": "sine"}],
    "over before it starts": [RAMP | {"until": 0}],
    "write N steps": [RAMP | {"until": "5 parsecs"}],
    "give from": [{"until": 5, "to": 1}],
    "never reached": [{"value": 1}, {"value": 2}],
    "is not after": [RAMP, {"until": 5, "value": 1}],
    "counted in steps": [{"until": "5 steps", "value": 1}, {"until": "1B", "to": 2}],
    "counted in tokens": [{"until": "1B", "value": 1}, {"until": "5 steps", "to": 2}],
}


@pytest.mark.parametrize("words", REFUSED)
def test_refusals_say_why(words):
    with pytest.raises(ValueError, match=words):
        Schedule.parse(REFUSED[words])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_are_finite(bad):
    with pytest.raises(ValueError):
        Schedule.parse(bad)
    with pytest.raises(ValueError, match="finite"):
        Schedule.parse([{"value": bad}])


def test_all_faults_are_told_at_once():
    with pytest.raises(ValueError) as caught:
        Schedule.parse([{"until": "x", "value": 1}, {"value": "y"}, 3])
    assert [f"phase {n}" in str(caught.value) for n in (1, 2, 3)] == [True] * 3


def test_phases_of_different_units_need_no_common_clock():
    schedule = Schedule.parse([{"until": "5 steps", "value": 1}, {"until": 100, "value": 2}, {"value": 3}])
    assert [schedule.at(*moment) for moment in ((4, 500), (5, 99), (5, 100), (9, 0))] == [1, 2, 3, 2]


@st.composite
def raw_schedules(draw):
    """Lists of phases that are well formed, in one unit or with units mixed where that is allowed."""
    numbers = st.floats(0, 1e6, allow_nan=False).map(lambda x: round(x, 4))
    unit, ends, raw = draw(st.sampled_from(["tokens", "steps"])), {"tokens": 0, "steps": 0}, []
    for index in range(draw(st.integers(1, 4))):
        moves = draw(st.booleans())
        if not moves:
            unit = draw(st.sampled_from(["tokens", "steps"]))
        elif raw and str(raw[-1]["until"]).endswith("steps") != (unit == "steps"):
            moves = False
        ends[unit] += draw(st.integers(1, 10**6))
        until = ends[unit] if unit == "tokens" else f"{ends[unit]} steps"
        phase = {"until": until}
        if moves:
            phase |= {"to": draw(numbers), "shape": draw(st.sampled_from(["linear", "cosine"]))}
            phase |= {"from": draw(numbers)} if index == 0 or draw(st.booleans()) else {}
        else:
            phase["value"] = draw(numbers)
        raw.append(phase)
    return raw + ([{"value": draw(numbers)}] if draw(st.booleans()) else [])


MOMENTS = st.tuples(st.integers(0, 10**7), st.integers(0, 10**7))


@given(raw_schedules(), MOMENTS)
def test_values_stay_between_lowest_and_highest(raw, moment):
    schedule = Schedule.parse(raw)
    assert schedule.lowest <= schedule.at(*moment) <= schedule.highest
    assert schedule.at(*moment) == schedule.at(*moment)


@given(raw_schedules())
def test_raw_form_is_read_back(raw):
    schedule = Schedule.parse(raw)
    assert Schedule.parse(schedule.to_raw()) == schedule


@given(raw_schedules(), MOMENTS, st.sampled_from([100, 1000, 4096]))
def test_multiples_are_among_the_distinct_ones(raw, moment, multiple):
    schedule = Schedule.parse(raw)
    found = schedule.at_multiple(*moment, multiple)
    assert found % multiple == 0 and found >= multiple
    assert found in schedule.distinct(multiple) == sorted(set(schedule.distinct(multiple)))
    assert found == multiple or found <= schedule.at(*moment) * (1 + 1e-11)


@given(st.floats(0, 1e3), st.floats(0, 1e3), st.lists(st.integers(0, 1000), min_size=2, max_size=9))
def test_ramps_are_monotone(first, last, counts):
    for shape in ("linear", "cosine"):
        ramp = Schedule.parse([{"until": 1000, "from": first, "to": last, "shape": shape}])
        values = [ramp.at(0, count) for count in sorted(counts)]
        assert values == sorted(values, reverse=last < first)
        assert ramp.at(0, 0) == first and ramp.at(0, 1000) == last


def test_it_imports_neither_torch_nor_omegaconf():
    said = "import sys, dsplugins.schedules; print([m for m in ('torch', 'omegaconf') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
