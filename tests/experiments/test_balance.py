"""The balance experiment: its arithmetic on numbers made by hand, its record, and one short real seed."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import forks
import numpy as np
import pytest

from dsplugins.experiments import balance
from dsplugins.experiments.balance import Measured, global_max_vio, judge, measure, results, runs
from dsplugins.experiments.balance_plot import draw

RECORDS = Path(__file__).parents[2] / "docs" / "records"
SMALL = (
    *("plugins.mtp=null", "plugins.python_source.max_bytes=400000", "plugins.python_source.validation=0.3"),
    *("model.num_layers=2", "model.hidden_size=32", "model.ffn_hidden_size=64"),
    *("model.num_moe_experts=8", "model.moe_router_topk=2", "model.moe_ffn_hidden_size=32"),
    *("model.moe_shared_expert_intermediate_size=32", "data.seq_length=64", "evaluate.sequences=16"),
    # A gate whose hidden states are all alike sends every token to the same experts: learn fast out of that.
    "train.learning_rate=[{until: 10 steps, from: 0, to: 5.0e-3}, {value: 5.0e-3}]",
)


def run(way, seed, value, batch=None):
    vios = {"global": value, "batch": value if batch is None else batch}
    return Measured(way, seed, vios, [value], 2.0, np.full(9, value))


def three_ways(seed, bias, loss, none):
    return [run("aux_free", seed, bias), run("aux_loss", seed, loss), run("none", seed, none)]


def left_behind(directory, loads, max_vio, batches=None):
    """A run directory as `dsplugins train` leaves it, as far as the experiment reads it."""
    directory.mkdir()
    batches = batches or [16] * len(loads)
    rows = [
        {"step": n, "expert_load": load, "max_vio": vio, "global_batch": batch}
        for n, (load, vio, batch) in enumerate(zip(loads, max_vio, batches, strict=True), 1)
    ]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "run.json").write_text(json.dumps({"evaluation": {"loss": 2.25}}))
    return directory


def test_the_last_third_is_measured(tmp_path):
    # One layer, two experts. Each batch of the last third is one-sided (MaxVio 0.5), their sum is not.
    loads = [[[2.0, 0.0]]] * 4 + [[[1.5, 0.5]], [[0.5, 1.5]]]
    found = measure("none", 1, left_behind(tmp_path / "run", loads, [1.0] * 4 + [0.5, 0.5]))
    assert found.max_vio == {"global": 0.0, "batch": 0.5}
    assert found.validation_loss == 2.25 and found.curve.tolist() == [1, 1, 1, 1, 0.5, 0.5]


def test_global_means_tokens_and_not_steps(tmp_path):
    # 3 x 1.5 + 1 x 0.5 = 5 of 8 shares: 5/4 of the mean.
    loads = [[[1.0, 1.0]]] * 4 + [[[1.5, 0.5]], [[0.5, 1.5]]]
    directory = left_behind(tmp_path / "run", loads, [0.5] * 6, batches=[8, 8, 8, 8, 24, 8])
    assert measure("none", 1, directory).max_vio["global"] == 0.25


def test_global_is_per_layer():
    loads = np.array([[[1.0, 1.0, 1.0, 1.0], [4.0, 0.0, 0.0, 0.0]]] * 3)
    assert global_max_vio(loads, np.ones(3)).tolist() == [0.0, 3.0]


def test_a_claim_holds_on_each_seed_and_on_the_mean():
    verdicts = judge([*three_ways(1, 0.5, 1.0, 1.25), *three_ways(2, 0.1, 0.9, 2.0)])
    assert all(verdict.holds for verdict in verdicts)
    assert {(v.measure, v.seed, v.less) for v in verdicts} == {
        (measure, seed, less)
        for measure in balance.MEASURES
        for seed in (1, 2, "mean")
        for less in ("aux_free", "aux_loss")
    }
    means = [v.ratio for v in verdicts if v.seed == "mean" and v.measure == "global"]
    assert means == [pytest.approx(0.6 / 1.9, abs=1e-4), pytest.approx(1.9 / 3.25, abs=1e-4)]


@pytest.mark.parametrize(
    ("ways", "broken"),
    [((0.51, 1.0, 2.0), "aux_free"), ((0.1, 1.0, 1.24), "aux_loss"), ((0.1, float("nan"), 2.0), "aux_free")],
)
def test_one_bad_seed_breaks_the_claim(ways, broken):
    measured = [*three_ways(1, 0.1, 1.0, 4.0), *three_ways(2, *ways)]
    assert (2, broken) in {(v.seed, v.less) for v in judge(measured) if not v.holds}
    assert not results(measured, 9)["holds"]


def test_each_measure_is_judged():
    measured = three_ways(1, 0.1, 1.0, 4.0)
    measured[0] = run("aux_free", 1, 0.1, batch=0.6)
    assert {(v.measure, v.holds) for v in judge(measured) if v.less == "aux_free"} == {
        ("global", True),
        ("batch", False),
    }


def test_perfect_balance_everywhere_has_no_ratio():
    assert [(v.ratio, v.holds) for v in judge(three_ways(1, 0.0, 0.0, 0.0))][0] == (None, True)
    assert not judge(three_ways(1, 0.1, 0.0, 0.0))[0].holds


def test_the_record_is_json_and_says_what_was_run():
    found = json.loads(json.dumps(results(three_ways(1, 0.1, 1.0, 2.0), 9, ["model.num_layers=2"])))
    assert (
        found["holds"] and found["measured_steps"] == [7, 9] and found["overrides"] == ["model.num_layers=2"]
    )
    assert found["means"]["aux_loss"] == {"global": 1.0, "batch": 1.0, "validation_loss": 2.0}
    assert [(one["way"], one["seed"]) for one in found["runs"]] == [(way, 1) for way in balance.WAYS]


def test_ways_differ_in_the_router_alone():
    from dsplugins.recipe import Recipe

    found = {}
    for way, seed, planned in runs(300, 2):
        recipe = Recipe.load(planned.recipe, planned.overrides)
        found[way, seed] = recipe
        assert recipe.sections["train"]["seed"] == seed and not recipe.problems
    assert len(found) == 6
    for seed in (1, 2):
        same = [
            (found[way, seed].sections, {k: v for k, v in found[way, seed].plugins.items() if k[:3] != "aux"})
            for way in balance.WAYS
        ]
        assert same[0] == same[1] == same[2]
        routers = [
            {k: v for k, v in found[way, seed].plugins.items() if k[:3] == "aux"} for way in balance.WAYS
        ]
        assert set(routers[0]) == {"aux_free"} and routers[0]["aux_free"]["sequence_loss"] == 0
        assert routers[1:] == [{"aux_loss": {"coeff": 0.001}}, {"aux_loss": {"coeff": 0.0}}]


def test_the_picture(tmp_path):
    for seeds in (1, 2):
        draw([one for seed in range(seeds) for one in three_ways(seed, 0.1, 1, 2)], tmp_path / "a" / "b.png")
        assert (tmp_path / "a" / "b.png").read_bytes()[:4] == b"\x89PNG"


def command(folder, *arguments):
    line = [sys.executable, "-m", "dsplugins", "experiment", "balance", *arguments]
    return forks.run(line, cwd=folder)


@pytest.mark.slow
def test_one_short_seed_of_a_small_model(tmp_path):
    short = ("--steps", "110", "--seeds", "1", "--jobs", "2", "--out", "out", "--runs", "runs", "--json")
    done = command(tmp_path, *short, *SMALL)
    record = json.loads(done.stdout)
    assert record == json.loads((tmp_path / "out" / "balance.json").read_text())
    assert (tmp_path / "out" / "balance.png").read_bytes()[:4] == b"\x89PNG"
    found = record["results"]
    assert done.returncode == 0 and found["holds"], found["verdicts"]
    ways = {(verdict["less"], verdict["more"], verdict["limit"]) for verdict in found["verdicts"]}
    assert ways == {("aux_free", "aux_loss", 0.5), ("aux_loss", "none", 0.8)}
    assert "plugins.mtp=null" in record["command"] and str(tmp_path) not in done.stdout
    for way in balance.WAYS:
        assert json.loads((tmp_path / "runs" / f"{way}_1" / "status.json").read_text())["code"] == 0


def test_a_run_that_cannot_start_is_told_with_its_code(tmp_path):
    done = command(tmp_path, "--seeds", "1", "--out", "out", "model.hidden_sice=3")
    assert done.returncode == 3 and "did you mean hidden_size" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()


def test_the_docs_quote_the_record():
    found = json.loads((RECORDS / "balance.json").read_text())["results"]
    assert found["holds"] and found["steps"] >= 300 and len(found["runs"]) == 9 and not found["overrides"]
    page = (RECORDS / "README.md").read_text()
    for way, means in found["means"].items():
        numbers = [f"{means[key]:.3f}" for key in ("global", "batch", "validation_loss")]
        assert re.search(rf"^\| `{way}`.*\| " + r" \| ".join(numbers) + r" \|$", page, re.MULTILINE), way
    closest = max(found["verdicts"], key=lambda verdict: verdict["ratio"] / verdict["limit"])
    assert f"{closest['measure']} MaxVio of seed {closest['seed']},\n{closest['ratio']:.3f} of the" in page


def test_every_record_is_listed():
    page = (RECORDS / "README.md").read_text()
    assert all(f"[{file.name}]({file.name})" in page for file in RECORDS.glob("*.json"))
