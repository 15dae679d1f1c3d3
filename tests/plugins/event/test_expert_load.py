"""Loads, MaxVio, dead experts, and the pictures of them."""

import json

import pytest
import torch

from dsplugins.pictures.history import ROWS
from dsplugins.plugins.event.expert_load import ExpertLoad, ExpertLoadOptions

LAYERS = ("decoder.1", "mtp.0")
COUNTS = torch.tensor([[4, 4, 4, 4], [16, 0, 0, 0]])


def random_counts(step, layers=2, experts=8):
    generator = torch.Generator().manual_seed(step)
    return torch.randint(1, 50, (layers, experts), generator=generator)


def test_numbers_of_a_step(make_step):
    found = ExpertLoad(ExpertLoadOptions()).ds_step_end(make_step(1, COUNTS, LAYERS))
    assert found == {
        "max_vio_per_layer": [0.0, 3.0],
        "dead_experts": 3,
        "expert_load": [[1.0, 1.0, 1.0, 1.0], [4.0, 0.0, 0.0, 0.0]],
    }
    json.dumps(found, allow_nan=False)


def test_mean_over_layers_is_the_hosts_max_vio(make_step):
    counts = random_counts(3).double()
    expected = ((counts.amax(1) - counts.mean(1)) / counts.mean(1)).mean().item()
    found = ExpertLoad(ExpertLoadOptions()).ds_step_end(make_step(1, counts.long(), LAYERS))
    assert sum(found["max_vio_per_layer"]) / 2 == pytest.approx(expected, abs=1e-4)


def test_an_idle_layer_is_no_division_by_zero(make_step):
    found = ExpertLoad(ExpertLoadOptions()).ds_step_end(make_step(1, torch.zeros(1, 4).long(), ["a"]))
    assert found["expert_load"] == [[0.0] * 4] and found["dead_experts"] == 4
    json.dumps(found, allow_nan=False)


def test_every_and_dense_models(make_step):
    plugin = ExpertLoad(ExpertLoadOptions(every=3))
    looked = [n for n in range(1, 10) if plugin.ds_step_end(make_step(n, COUNTS, LAYERS))]
    assert looked == [3, 6, 9]
    assert plugin.ds_step_end(make_step(12)) is None


@pytest.mark.parametrize(("steps", "layers"), [(1, 2), (40, 2), (40, 20)])
def test_pictures(make_step, make_end, check_png, tmp_path, steps, layers):
    plugin = ExpertLoad(ExpertLoadOptions())
    names = [f"decoder.{i}" for i in range(layers)]
    for step in range(1, steps + 1):
        plugin.ds_step_end(make_step(step, random_counts(step, layers), names))
    shown = plugin.ds_run_end(make_end())
    assert {str(p) for p in (tmp_path / "plots").iterdir()} == set(shown.values())
    assert len(shown) == 3
    for path in shown.values():
        check_png(path)


def test_a_resumed_run_draws_its_past(make_step, make_end, write_metrics, monkeypatch):
    from dsplugins.pictures import loads as drawn

    seen = []
    over_time = drawn.over_time
    monkeypatch.setattr(drawn, "over_time", lambda *a: seen.append(a) or over_time(*a))
    first, second = ExpertLoad(ExpertLoadOptions()), ExpertLoad(ExpertLoadOptions())
    rows = [{"step": n, **first.ds_step_end(make_step(n, random_counts(n), LAYERS))} for n in range(1, 8)]
    write_metrics([*rows, {"step": 8}], tail='{"step": 9, "expert_lo')
    for n in (5, 6):
        second.ds_step_end(make_step(n, random_counts(100 + n), LAYERS))
    second.ds_run_end(make_end())
    steps, loads, layers = seen[0]
    assert steps.tolist() == [1, 2, 3, 4, 5, 6] and layers == LAYERS
    assert (torch.tensor(loads[3]) - torch.tensor(rows[3]["expert_load"])).abs().max() < 1e-6
    fresh = random_counts(105).double()
    assert (torch.tensor(loads[4]) - fresh / fresh.mean(1, keepdim=True)).abs().max() < 1e-5


def test_long_runs_are_thinned_evenly(make_step):
    plugin = ExpertLoad(ExpertLoadOptions())
    for step in range(1, 5 * ROWS):
        plugin.ds_step_end(make_step(step, COUNTS, LAYERS))
    steps, loads = plugin._history.since_start([])
    assert ROWS // 2 <= len(steps) <= ROWS and len(loads) == len(steps)
    assert steps[0] == 1 and set(steps[1:] - steps[:-1]) == {8}


def test_no_pictures_where_none_are_wanted(make_step, make_end, tmp_path):
    plugin = ExpertLoad(ExpertLoadOptions(plots=False))
    plugin.ds_step_end(make_step(1, COUNTS, LAYERS))
    assert plugin.ds_run_end(make_end()) is None and not (tmp_path / "plots").exists()
    assert ExpertLoad(ExpertLoadOptions()).ds_run_end(make_end()) is None


def test_check(moe_settings, without):
    def problems(**options):
        return list(ExpertLoad(ExpertLoadOptions(**options)).ds_check(None, moe_settings))

    assert problems() == []
    without("matplotlib")
    (problem,) = problems()
    assert problem.kind == "environment" and problem.key == "plugins.expert_load.plots"
    assert "dsplugins[plot]" in problem.remedy and "plugins.expert_load.plots=false" in problem.remedy
    assert problems(plots=False) == []


def test_check_wants_experts(moe_settings):
    moe_settings.model.num_moe_experts = None
    (problem,) = ExpertLoad(ExpertLoadOptions()).ds_check(None, moe_settings)
    assert problem.kind == "recipe" and "num_moe_experts" in problem.message
