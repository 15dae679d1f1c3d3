"""fp8_monitor: sums by hand, names that mean the same on every rank, and steps that aren't looked at."""

from __future__ import annotations

import contextlib
import json
from types import SimpleNamespace

import pytest
import torch
from runs import SEQUENTIAL

FP8 = [
    *("plugins.fp32=null", "plugins.fp8_v3={outside: fp32}"),
    *("train.micro_batch=2", "plugins.fp8_monitor={every: 3}"),
]
LINEARS = {
    "self_attention.linear_q_down_proj",
    "self_attention.linear_kv_up_proj",
    "self_attention.linear_proj",
}
PRODUCTS = {"fprop.x", "fprop.w", "dgrad.dy", "wgrad.dy", "wgrad.x"}


def test_sums_are_those_made_by_hand():
    from dsplugins.numerics.tiles import ROW, quantise
    from dsplugins.plugins.event.fp8.errors import sums

    x = torch.zeros(1, 128)
    x[0, :4] = torch.tensor([448.0, 17.0, 2.0**-11, 1.0])  # scale 1: 17 becomes 16, 2^-11 nothing
    off, whole, gone, cut, bad, count = sums(x, quantise(x, ROW)).tolist()
    assert off == 1.0 + 2.0**-22 and whole == 448.0**2 + 17.0**2 + 2.0**-22 + 1
    assert (gone, cut, bad, count) == (1, 0, 0, 128)


@pytest.mark.parametrize(("largest", "cut"), [(463.0, 0), (465.0, 1)])
def test_what_lies_beyond_the_format_was_cut(largest, cut):
    """A scale that was made of other numbers: up to half a unit beyond 448 is rounding."""
    from dsplugins.numerics.tiles import ROW, Quantised
    from dsplugins.plugins.event.fp8.errors import sums

    x = torch.full((1, 128), 2.0)
    x[0, 0] = 2 * largest
    codes = (x / 2).clamp(max=448).to(torch.float8_e4m3fn)
    assert sums(x, Quantised(codes, torch.full((1, 1), 2.0), ROW))[3] == cut


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_counted_and_spoils_nothing_else(bad):
    from dsplugins.numerics.tiles import ROW, quantise
    from dsplugins.plugins.event.fp8.errors import merged, sums

    x = torch.ones(2, 128)
    x[0, 3] = bad
    (row,) = merged([{("m", "fprop.x"): sums(x, quantise(x, ROW)).tolist()}])
    assert row.not_finite >= 1 and row.error == 0 and row.saturation == 0


def test_ranks_are_merged_by_their_numbers():
    from dsplugins.plugins.event.fp8.errors import merged

    first, second = [3.0, 100.0, 1.0, 0.0, 0.0, 10.0], [1.0, 300.0, 0.0, 0.0, 0.0, 30.0]
    small, (only, *_) = {("a", "fprop.x"): [0.0, 1.0, 0.0, 0.0, 0.0, 1.0]}, merged([{("b", "w"): first}])
    assert only.error == pytest.approx(0.03**0.5)
    rows = merged([{("b", "w"): first} | small, {("b", "w"): second}])
    assert [(row.module, row.error, row.underflow) for row in rows] == [("b", 0.1, 1 / 40), ("a", 0.0, 0.0)]


def watched(overrides, directory, steps):
    """Steps of a run with its events: what each added to `metrics.jsonl`, and who looked meanwhile."""
    from runs import assembled

    from dsplugins.plugins.event.fp8.names import watches
    from dsplugins.step import Progress, take_step

    (directory / "unused").mkdir(exist_ok=True)
    with contextlib.chdir(directory), assembled([*overrides, f"train.steps={steps}"]) as run:
        added, looked, progress = [], [], Progress()
        for _ in range(steps):
            looked.append(any(watch.look is not None for _, watch in watches(run.chunks)))
            step = take_step(run, progress)
            progress = progress.after(step)
            added.append([found for _, found in run.plugins.event("ds_step_end", step=step) if found])
    return added, looked


@pytest.mark.parametrize(
    "overrides",
    [["parallel.expert=2"], ["parallel.pipeline=2"], ["parallel.expert=2", *SEQUENTIAL]],
    ids=["EP2", "PP2", "EP2 sequential"],
)
def test_every_layer_and_linear_of_all_ranks_is_told(workers, tmp_path, overrides):
    ranks = workers(2).run(watched, [*FP8, *overrides], tmp_path, 1)
    table = json.loads((tmp_path / "unused" / "fp8_monitor.json").read_text())
    assert table["step"] == 1
    operands = {}
    for row in table["rows"]:
        operands.setdefault(row["module"], set()).add(row["operand"])
        # Powers of two twice: the tokens of routed experts are rounded once and for all (report, 3.3.3).
        twice = row["operand"] == "wgrad.x" and row["module"].endswith("mlp.experts.linear_fc1")
        assert row["error"] < 0.001 if twice else 0.005 < row["error"] < 0.06, row
        assert row["saturation"] == row["not_finite"] == 0 and 0 <= row["underflow"] < 0.2, row
    for layer in ("layer 1", "layer 2", "layer 3", "layer 4", "mtp 1"):
        assert all(operands[f"{layer} {linear}"] == PRODUCTS for linear in LINEARS)
    assert operands["layer 1 mlp.linear_fc1"] == PRODUCTS
    assert operands["layer 1 mlp.linear_fc2"] == PRODUCTS | {"kept.x"}
    for layer in ("layer 2", "layer 4", "mtp 1"):
        assert operands[f"{layer} mlp.experts.linear_fc1"] == PRODUCTS
        assert operands[f"{layer} mlp.experts.linear_fc2"] == PRODUCTS | {"kept.x"}
    (first,), _ = ranks[0][0][0], ranks[1]
    worst = table["rows"][0]
    assert first["fp8_error"] == worst["error"] == max(row["error"] for row in table["rows"])
    assert first["fp8_error_at"] == f"{worst['module']} {worst['operand']}"


def test_a_stage_without_linears_has_nothing_to_tell_and_takes_part(workers, tmp_path):
    layout = ["plugins.mtp=null", "parallel.pipeline=2", "model.pipeline_model_parallel_layout='E|ttttL'"]
    ranks = workers(2).run(watched, [*FP8, *layout], tmp_path, 1)
    assert [added for added, _ in ranks] == [ranks[0][0]] * 2 and ranks[0][0][0][0]["fp8_error"] > 0
    assert [looked for _, looked in ranks] == [[False], [True]]


def test_nothing_is_made_ready_for_nobody_who_looks(monkeypatch):
    from dsplugins.plugins.precision.fp8 import products, rule

    def refuse(*_):
        raise AssertionError("experts' codes were taken apart for nobody")

    monkeypatch.setattr(products, "_watch", refuse)
    mine = rule.rule_for("fc1", True, rule.Choice())
    x, weights = torch.randn(6, 128), torch.randn(2, 64, 128)
    codes = products.activation(x, mine)
    products.output(codes, weights, [4, 2], mine, torch.float32)
    products.weight_gradient(torch.randn(6, 64), codes, [4, 2], mine, torch.zeros(2, 64, 128))
    mine.watch.look = lambda *_: None
    with pytest.raises(AssertionError, match="for nobody"):
        products.output(codes, weights, [4, 2], mine, torch.float32)


def test_other_steps_are_left_alone(workers, tmp_path):
    for added, looked in workers(2).run(watched, FP8, tmp_path, 4):
        assert looked == [True, False, True, False]
        assert [bool(found) for found in added] == looked
    assert json.loads((tmp_path / "unused" / "fp8_monitor.json").read_text())["step"] == 3


def test_looking_changes_no_bit(workers, tmp_path):
    from runs import trained

    watched_too = workers(1).run(trained, [*FP8, "train.steps=2"])[0]
    alone = workers(1).run(trained, [*FP8[:-1], "train.steps=2"])[0]
    assert [row["loss"] for row in watched_too["rows"]] == [row["loss"] for row in alone["rows"]]
    assert [row["grad_norm"] for row in watched_too["rows"]] == [row["grad_norm"] for row in alone["rows"]]


def refused(overrides):
    from runs import assembled

    from dsplugins.contracts import RecipeError

    with pytest.raises(RecipeError) as error, assembled(overrides):
        pass
    return [(problem.key, problem.message) for problem in error.value.problems]


def test_a_run_that_quantises_nothing_is_refused(workers):
    ((key, said),) = workers(1).run(refused, ["plugins.fp8_monitor={}"])[0]
    assert key == "plugins.fp8_monitor" and "fp32 quantises nothing, or shows nothing of it" in said


def test_check_tells_it_without_a_run():
    from dsplugins.numerics.watch import Watch
    from dsplugins.plugins.event.fp8_monitor import Fp8Monitor, Fp8MonitorOptions

    plan = SimpleNamespace(slots={"precision": "bf16"})
    blind, seeing = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    seeing.watches = {"": Watch()}
    monitor = Fp8Monitor(Fp8MonitorOptions())
    assert [problem.key for problem in monitor.ds_check_built(plan, [[blind]])] == ["plugins.fp8_monitor"]
    assert list(monitor.ds_check_built(plan, [[blind], [seeing]])) == []
