"""Event files that TensorBoard can read."""

from types import SimpleNamespace

import pytest

from dsplugins.plugins.event.tensorboard import Tensorboard, TensorboardOptions


def started(folder, **options):
    plugin = Tensorboard(TensorboardOptions(**options))
    plugin.ds_model_built(SimpleNamespace(run=SimpleNamespace(directory=str(folder))), [])
    return plugin


def points(folder):
    """{tag: [(step, value)]} by TensorBoard's own reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    tags = events.Tags()["scalars"]
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags}


def test_scalars_can_be_read(make_step, make_evaluation, make_end, tmp_path):
    plugin = started(tmp_path)
    for n in (1, 2, 3):
        plugin.ds_step_end(make_step(n, scheduled={"mtp_loss_scaling_factor": 0.3}, max_vio=0.25))
    plugin.ds_evaluated(make_evaluation(3, 2.5, mtp_acceptance=0.75))
    plugin.ds_run_end(make_end())
    found = points(tmp_path / "tensorboard")
    assert found["train/loss"] == [(1, 5.0), (2, 2.5), (3, pytest.approx(5 / 3))]
    assert found["schedule/learning_rate"][0] == (1, pytest.approx(1e-3))
    assert found["schedule/mtp_loss_scaling_factor"][-1] == (3, pytest.approx(0.3))
    assert found["balance/max_vio"][0] == (1, 0.25)
    assert found["validation/loss"] == [(3, 2.5)] and found["validation/mtp_acceptance"] == [(3, 0.75)]
    assert "train/mtp_loss" not in found and "validation/mtp_loss" not in found


def test_every_and_folder(make_step, make_end, tmp_path):
    plugin = started(tmp_path, every=2, directory="logs/tb")
    for n in range(1, 7):
        plugin.ds_step_end(make_step(n))
    plugin.ds_run_end(make_end())
    assert [step for step, _ in points(tmp_path / "logs" / "tb")["train/loss"]] == [2, 4, 6]


def test_a_resumed_run_replaces_what_came_after_its_checkpoint(make_step, make_end, tmp_path):
    import time

    first = started(tmp_path)
    for n in (1, 2, 3, 4):
        first.ds_step_end(make_step(n))
    first.ds_run_end(make_end())
    time.sleep(1.1)  # event files are named, and read, by the second
    second = started(tmp_path)
    for n in (3, 4, 5):
        second.ds_step_end(make_step(n, loss=9.0))
    second.ds_run_end(make_end())
    losses = points(tmp_path / "tensorboard")["train/loss"]
    assert losses == [(1, 5.0), (2, 2.5), (3, 9.0), (4, 9.0), (5, 9.0)]


def write_on_both(folder, step):
    plugin = started(folder)
    plugin.ds_step_end(step)
    return plugin._writer is not None


def test_only_the_first_rank_writes(workers, make_step, tmp_path):
    assert workers(2).run(write_on_both, tmp_path, make_step(1)) == [True, False]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1


def test_a_run_without_steps_ends_quietly(make_end, tmp_path):
    started(tmp_path).ds_run_end(make_end())
    assert not (tmp_path / "tensorboard").exists()


def test_check(without):
    def problems(**options):
        return list(Tensorboard(TensorboardOptions(**options)).ds_check(None, None))

    assert problems() == []
    for directory in ("/elsewhere", "../up"):
        (problem,) = problems(directory=directory)
        assert problem.kind == "recipe" and problem.key == "plugins.tensorboard.directory"
    without("tensorboard")
    (problem,) = problems()
    assert problem.kind == "environment" and "dsplugins[tensorboard]" in problem.remedy
