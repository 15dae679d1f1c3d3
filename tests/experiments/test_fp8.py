"""The FP8 experiment: its arithmetic on losses made by hand, its ways, its record and its picture."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dsplugins.experiments.fp8 import (
    LIMITS,
    WAYS,
    Measured,
    drift,
    gaps,
    learning_rate,
    measure,
    results,
    runs,
    smoothed,
    warm_up,
)
from dsplugins.experiments.fp8_plot import draw

FALLING = np.linspace(4.0, 2.0, 30)


def three_ways(seed, twin, quantised):
    """Runs whose losses are those of `bf16` times 1 + a number or a number for each step."""
    ways = {"bf16": 0.0, "twin": twin, "fp8_v3": quantised}
    return [Measured(way, seed, FALLING * (1 + off), 2.0) for way, off in ways.items()]


def test_losses_are_smoothed():
    assert smoothed(np.array([2.0, 2.0, 3.0])).tolist() == pytest.approx([2.0, 2.0, 2.1])


def test_gaps_are_relative_and_of_each_seed():
    found = gaps([*three_ways(1, 0.0, 0.001), *three_ways(2, 0.0, -0.002)], "fp8_v3")
    assert found[1] == pytest.approx(np.full(30, 0.001)) and found[2] == pytest.approx(np.full(30, -0.002))


def test_what_happens_in_warm_up_is_not_compared():
    early = np.where(np.arange(30) < 3, 0.02, 0.0) * 1e-3  # of which the average keeps half after three steps
    assert warm_up(30) == 6
    found = results(three_ways(1, early, 0.0), 30)
    assert found["compared_steps"] == [7, 30] and found["holds"]


@pytest.mark.parametrize(
    ("twin", "quantised", "holds"),
    [(0.0009, 0.0024, True), (0.0011, 0.0, False), (0.0, 0.0026, False), (-0.0011, 0.0, False)],
)
def test_the_claim_is_of_every_seed(twin, quantised, holds):
    found = results([*three_ways(1, 0.0, 0.0), *three_ways(2, twin, quantised)], 30)
    assert found["holds"] is holds
    assert found["percent"]["fp8_v3"]["largest_gap_by_seed"] == {1: 0.0, 2: pytest.approx(100 * quantised)}


def test_how_long_the_floor_holds():
    """Nothing is told by what a way does after the twin of any seed has left."""
    leaves = np.where(np.arange(30) >= 19, 0.02, 0.0)
    measured = [*three_ways(1, 0.0, np.where(np.arange(30) >= 20, 0.5, 0.002)), *three_ways(2, leaves, 0.0)]
    found = results(measured, 30)
    assert found["floor_holds_until_step"] == 19 and not found["holds"]
    assert found["percent"]["fp8_v3"]["largest_gap_while_floor_holds"] == pytest.approx(0.2)
    assert results(three_ways(1, 0.0005, 0.002), 30)["floor_holds_until_step"] == 30
    at_once = results(three_ways(1, 0.01, 0.002), 30)
    assert at_once["floor_holds_until_step"] == 6
    assert at_once["percent"]["fp8_v3"]["largest_gap_while_floor_holds"] == 0.0


def test_a_loss_that_is_not_finite_does_not_hold():
    assert not results(three_ways(1, 0.0, float("nan")), 30)["holds"]


def test_a_drift_is_told_from_scatter():
    """Student's interval of 1, 2, 3 is 2 +- 4.303 / sqrt(3); that of 2.9, 3, 3.1 leaves zero out."""
    scattered = [one for seed, off in enumerate((1e-3, 2e-3, 3e-3)) for one in three_ways(seed, 0, off)]
    found = drift(scattered, "fp8_v3")
    assert found["mean"] == pytest.approx(2e-3) and not found["differs_from_zero"]
    assert found["half_interval"] == pytest.approx(4.303e-3 / 3**0.5)
    alike = [one for seed, off in enumerate((2.9e-3, 3e-3, 3.1e-3)) for one in three_ways(seed, 0, off)]
    assert drift(alike, "fp8_v3")["differs_from_zero"]
    assert drift(three_ways(1, 0, 1e-3), "fp8_v3")["half_interval"] is None


def test_drift_looks_at_the_last_third():
    late = np.where(np.arange(30) >= 20, 1e-3, 0.0)
    assert drift(three_ways(1, 0.0, late), "fp8_v3")["mean"] == pytest.approx(1e-3)


def test_ways_differ_in_nothing_else():
    from dsplugins.recipe import Recipe

    found = {
        (way, seed): Recipe.load(run.recipe, [*run.overrides])
        for way, seed, run in runs(90, 2, ["train.log_every=3"], why=True)
    }
    assert len(found) == 12 and not any(recipe.problems for recipe in found.values())
    for seed in (1, 2):
        base, twin, quantised, rough, *parts = (found[way, seed] for way in WAYS)
        assert base.sections["save"] == {**twin.sections["save"], "at_end": seed == 1}
        base.sections["save"] = twin.sections["save"]
        assert base.sections["train"]["seed"] == seed and base.sections["train"]["log_every"] == 3
        assert twin.sections == {**base.sections, "train": {**base.sections["train"], "twin": True}}
        assert twin.plugins == base.plugins and quantised.sections == base.sections
        others = {name: options for name, options in base.plugins.items() if name != "bf16"}
        assert quantised.plugins == {**others, "fp8_v3": {}}
        assert rough.sections["train"] == {**base.sections["train"], "twin": 0.026}
        products = [part.plugins["fp8_v3"]["products"] for part in parts]
        assert products == [["fprop"], ["dgrad", "wgrad"]]
        assert all({**part.plugins, "fp8_v3": {}} == quantised.plugins for part in parts)


def test_the_claim_takes_three_ways_and_why_takes_more():
    assert [way for way, _, _ in runs(90, 1)] == ["bf16", *LIMITS] == ["bf16", "twin", "fp8_v3"]
    assert [way for way, _, _ in runs(90, 1, why=True)] == [*WAYS]


def test_the_recipe_s_schedule_stretches_with_the_steps():
    from dsplugins.recipe import Recipe

    train = Recipe.load("experiments/fp8.yaml", []).sections["train"]
    assert train["learning_rate"] == learning_rate(train["steps"])
    assert learning_rate(80, 1e-4)[1]["value"] == 1e-4
    assert [piece["until"] for piece in learning_rate(80)] == ["16 steps", "40 steps", "80 steps"]


def test_overrides_replace_the_schedule_but_not_what_is_counted():
    from dsplugins.recipe import Recipe

    asked = ["train.learning_rate=1e-5", "train.steps=3", "train.seed=7"]
    found = [Recipe.load(run.recipe, [*run.overrides]).sections["train"] for _, _, run in runs(90, 2, asked)]
    assert {(train["steps"], train["learning_rate"]) for train in found} == {(90, 1e-5)}
    assert [train["seed"] for train in found] == [1, 1, 1, 2, 2, 2]


def test_weights_of_its_recipe_are_several_blocks():
    """Hidden size 512 and experts of 256, at least: one block would hide what blocks do."""
    from dsplugins.recipe import Recipe

    model = Recipe.load("experiments/fp8.yaml", []).sections["model"]
    assert model["hidden_size"] >= 512 and model["moe_ffn_hidden_size"] >= 256


def test_what_a_run_left_is_read(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 3.5}\n{"step": 2, "loss": 3.25}\n')
    (tmp_path / "run.json").write_text(json.dumps({"evaluation": {"loss": 2.25}}))
    found = measure("twin", 1, tmp_path)
    assert found.losses.tolist() == [3.5, 3.25] and found.validation_loss == 2.25


def test_a_run_is_evaluated_or_why_not_is_told(tmp_path):
    from dsplugins.experiments.runs import RunFailed, evaluated

    with pytest.raises(RunFailed, match="(?s)none, evaluated, ended with code 2.*holds no run") as told:
        evaluated(tmp_path / "none", [])
    assert told.value.code == 2


def test_how_far_a_run_has_come_from_where_it_started(tmp_path):
    """One update of Adam is as large as the rate, here a hundredth of the weights' size."""
    import sys

    import forks

    from dsplugins.experiments.fp8_moved import moved

    change = [
        "plugins.fp32=null",
        "plugins.bf16={}",
        "model.init_method_std=0.02",
        "train.learning_rate=2e-4",
    ]
    tiny = str(Path(__file__).parents[1] / "tiny.yaml")
    line = ["train", tiny, *change, "train.steps=1", "train.seed=3", "evaluate.sequences=0"]
    assert forks.run([sys.executable, "-m", "dsplugins", *line, f"run.directory={tmp_path}"]).returncode == 0
    found = moved(tmp_path)
    assert found["seed"] == 3 and found["matrices"] > 20
    assert 0.5 < found["learned_percent_of_start"] < 1.5
    rounding = found["learned_percent_of_start"] * found["rounding_percent_of_learned"] / 100
    assert 2.2 < rounding < 3.2  # percent of the weight: three bits of mantissa


def test_the_picture(tmp_path):
    draw([*three_ways(1, 1e-4, 1e-3), *three_ways(2, -1e-4, -1e-3)], tmp_path / "a" / "b.png")
    assert (tmp_path / "a" / "b.png").read_bytes()[:4] == b"\x89PNG"


def test_the_command_trains_and_records(tmp_path, monkeypatch):
    """Losses as a run leaves them, in the place of the 9 and the 18 runs."""
    from click.testing import CliRunner

    from dsplugins.cli import experiment_runs, fp8
    from dsplugins.cli.experiment import command
    from dsplugins.experiments import fp8 as experiment

    def pretend(planned, where, jobs):
        for run in planned:
            folder = Path(where, run.name)
            folder.mkdir(parents=True)
            off = 1e-3 if run.name.startswith("fp8") else 0.0
            rows = [json.dumps({"loss": loss * (1 + off)}) + "\n" for loss in FALLING]
            (folder / "metrics.jsonl").write_text("".join(rows))
            (folder / "run.json").write_text(json.dumps({"evaluation": {"loss": 2.0}}))

    looks: list[tuple[str, ...]] = []

    def look(folder, overrides):
        looks.append((folder.name, *overrides))
        return 2.0 + 0.002 * (len(overrides) > 1)

    monkeypatch.setattr(fp8, "train_all", pretend)
    monkeypatch.setattr(experiment, "evaluated", look)
    come = {"learned_percent_of_start": 5.0, "rounding_percent_of_learned": 50.0}
    monkeypatch.setattr(experiment, "moved", lambda folder: come)
    assert experiment_runs.train_all is not pretend
    done = CliRunner().invoke(command, ["fp8", "--steps", "30", "--out", str(tmp_path)])
    assert done.exit_code == 0 and "the claim holds" in done.output
    assert "a weight's way from its start: 5.0 % of it; rounding: 50 % of that way" in done.output
    record = json.loads((tmp_path / "fp8.json").read_text())
    assert record["results"]["percent"]["fp8_v3"]["largest_gap"] == pytest.approx(0.1)
    assert record["command"] == "dsplugins experiment fp8 --steps 30 --seeds 3"
    assert (tmp_path / "fp8.png").exists()
    assert [*record["results"]["percent"]] == [*LIMITS]
    assert record["results"]["direct"]["percent"] == pytest.approx(0.1)
    assert record["results"]["moved"] == come
    plain = ("bf16_1", "evaluate.sequences=256")
    assert looks == [plain, (*plain, *WAYS["fp8_v3"])]
    named = ["fp8", "--steps", "30", "--name", "fp8_mine", "--out", str(tmp_path)]
    assert CliRunner().invoke(command, named).exit_code == 0
    record = json.loads((tmp_path / "fp8_mine.json").read_text())
    assert record["command"] == "dsplugins experiment fp8 --steps 30 --seeds 3 --name fp8_mine"
    done = CliRunner().invoke(command, ["fp8", "--why", "--steps", "30", "--out", str(tmp_path)])
    assert done.exit_code == 0 and "fp8_why.png beside it" in done.output
    record = json.loads((tmp_path / "fp8_why.json").read_text())
    assert record["command"] == "dsplugins experiment fp8 --steps 30 --seeds 3 --why"
    explained = [way for way, one in record["results"]["percent"].items() if one["limit"] is None]
    assert explained == ["rough", "fprop", "backward"]
    assert [record["results"]["percent"][way]["holds"] for way in explained] == [None] * 3
    assert (tmp_path / "fp8_why.png").exists()
