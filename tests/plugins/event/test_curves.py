"""Loss and schedule pictures from `metrics.jsonl`."""

import numpy as np
import pytest

from dsplugins.contracts import RecipeError
from dsplugins.pictures import curves
from dsplugins.pictures.style import read_metrics
from dsplugins.plugins.event.curves import Curves, CurvesOptions


def row(step, **changes):
    return {
        "step": step,
        "loss": 5.5 - 0.02 * step,
        "mtp_loss": 5.6 - 0.02 * step,
        "learning_rate": 1e-5 * step,
        "global_batch": 8,
        "bias_update_rate": 1e-3,
        "mtp_weight": None,
    } | changes


@pytest.mark.parametrize("steps", [1, 3, 120])
def test_pictures(make_end, make_evaluation, write_metrics, check_png, tmp_path, steps):
    write_metrics([row(n) for n in range(1, steps + 1)])
    plugin = Curves(CurvesOptions())
    (tmp_path / "evaluations.jsonl").write_text('{"step": 1, "loss": 5.4}\n')
    shown = plugin.ds_run_end(make_end(make_evaluation(steps, 4.0), {"unigram": 3.2, "bigram": 2.4}))
    assert shown == {
        "losses_plot": str(tmp_path / "plots" / "losses.png"),
        "schedules_plot": str(tmp_path / "plots" / "schedules.png"),
    }
    for path in shown.values():
        check_png(path)


def test_lines_show_the_numbers():
    drawn = curves.losses([row(n) for n in range(1, 31)], {10: 5.0, 1: 5.5}, {"bigram": 2.4})
    lines = {line.get_label(): line for line in drawn.axes[0].get_lines()}
    assert lines["training"].get_ydata() == pytest.approx([5.5 - 0.02 * n for n in range(1, 31)])
    assert lines["MTP"].get_ydata()[-1] == pytest.approx(5.0)
    assert list(lines["validation"].get_xdata()) == [1, 10]
    assert any(list(line.get_ydata()) == [2.4, 2.4] for line in drawn.axes[0].get_lines())


def test_what_a_run_lacks_is_not_drawn():
    rows = [row(n, mtp_loss=None) for n in range(1, 5)]
    labels = [line.get_label() for line in curves.losses(rows, {}, {}).axes[0].get_lines()]
    assert labels == ["training"]
    titles = [panel.get_title(loc="left") for panel in curves.schedules(rows).axes]
    assert titles == ["learning rate", "sequences a step", "bias update rate"]


def test_running_mean_against_a_plain_loop():
    values = np.random.default_rng(1).normal(size=50)
    values[7:9] = np.nan
    expected = [np.nanmean(values[max(0, i - 2) : i + 3]) for i in range(50)]
    assert curves._running_mean(values, 4) == pytest.approx(expected)
    assert np.isnan(curves._running_mean(np.array([np.nan, 1.0]), 1)).tolist() == [True, False]


def test_metrics_are_read_with_resumes_and_a_torn_end(write_metrics, tmp_path):
    write_metrics([row(1), row(2), row(3), row(2, loss=9.0)], tail='{"step": 3, "lo')
    rows = read_metrics(tmp_path)
    assert [(r["step"], r["loss"]) for r in rows] == [(1, 5.48), (2, 9.0), (3, 5.44)]
    write_metrics([row(1)], tail='broken\n{"step": 2}\n')
    with pytest.raises(RecipeError, match="line 2 is damaged"):
        read_metrics(tmp_path)


def test_nothing_to_draw(make_end, write_metrics, tmp_path):
    assert Curves(CurvesOptions()).ds_run_end(make_end()) is None
    write_metrics([row(1)])
    assert Curves(CurvesOptions(plots=False)).ds_run_end(make_end()) is None
    assert not (tmp_path / "plots").exists()


def test_check(without, moe_settings):
    assert list(Curves(CurvesOptions()).ds_check(None, moe_settings)) == []
    without("matplotlib")
    (problem,) = Curves(CurvesOptions()).ds_check(None, moe_settings)
    assert problem.kind == "environment" and "plugins.curves.plots=false" in problem.remedy
    assert list(Curves(CurvesOptions(plots=False)).ds_check(None, moe_settings)) == []
