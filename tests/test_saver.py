"""State of plugins: to whom it belongs, and a clear answer where one is gone, new or of another version."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from dsplugins.contracts import EnvironmentUnfit


class Kept:
    def __init__(self, version=1):
        self.version, self.got = version, None

    def save(self):
        return {"x": 1}

    def load(self, saved):
        self.got = saved


def give_back(states, saved):
    from dsplugins.checkpoint.store import Checkpoint
    from dsplugins.saver import Saver

    saver = SimpleNamespace(_states=states)
    return list(Saver._give_back(saver, Checkpoint(Path("step-00000003"), 3), saved))


def test_each_plugin_gets_its_own_back(single):
    mine, other = Kept(), Kept()
    assert give_back({"a": mine, "b": other}, {"a": {"version": 1, "state": {"x": 5}}}) == [
        "plugin b starts without state: step-00000003 has none of it"
    ]
    assert mine.got == {"x": 5} and other.got is None


def test_what_is_gone_is_told(single):
    told = give_back({}, {"a": {"version": 1, "state": {}}})
    assert told == ["plugin a is not in this run: its state in step-00000003 is left out"]


def test_another_version_stops_before_the_run(single):
    with pytest.raises(EnvironmentUnfit, match="saved its state in version 1 and now takes 2"):
        give_back({"a": Kept(2)}, {"a": {"version": 1, "state": {}}})


def saver(folder, group):
    from dsplugins.saver import Saver

    made = object.__new__(Saver)
    made._run, made._folder, made._group = SimpleNamespace(rank=0), folder, group
    return made


@pytest.fixture
def folder(single, tmp_path):
    """A folder with one checkpoint, which is damaged."""
    (tmp_path / "step-00000003").mkdir()
    return tmp_path


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over(folder):
    import torch.distributed as dist

    with pytest.raises(EnvironmentUnfit, match="step-00000003 is damaged .* start over with --fresh"):
        saver(folder, dist.group.WORLD).resume()
    assert (folder / "step-00000003").is_dir()


def test_fresh_starts_over_or_says_why_it_cannot(folder, monkeypatch):
    import shutil

    import torch.distributed as dist

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", refuse)
        with pytest.raises(EnvironmentUnfit, match="Permission denied"):
            saver(folder, dist.group.WORLD).resume(fresh=True)
    progress, told = saver(folder, dist.group.WORLD).resume(fresh=True)
    assert progress.steps == 0 and told == [] and [*folder.iterdir()] == []


class Model(SimpleNamespace):
    """A run of one rank whose checkpoints hold nothing but facts."""


@pytest.fixture
def writes(single, tmp_path, monkeypatch):
    """(saver that writes in the background, list of the steps it was asked to write, steps that fail)."""
    import threading

    import torch.distributed as dist

    from dsplugins import saver as module

    asked, failing = [], set()

    def save(folder, step, held, facts, group):
        asked.append((step, threading.current_thread() is threading.main_thread()))
        if step in failing:
            raise OSError("rank 0: No space left on device: x")
        return step

    monkeypatch.setattr(module.store, "save", save)
    made = background(tmp_path, monkeypatch, lambda *some: [])
    yield made, asked, failing
    made._writer.shutdown()
    dist.destroy_process_group(made._group)


def background(folder, monkeypatch, pieces):
    """A saver that writes in the background, of a run of one rank that holds `pieces`."""
    from dsplugins import saver as module

    monkeypatch.setattr(module, "optimizer_steps", lambda *some: {})
    monkeypatch.setattr(module, "pieces", pieces)
    monkeypatch.setattr(module, "gather_weights", lambda *some: None)
    options = SimpleNamespace(asynchronous=True, keep=1, keep_every=0, every=0, minutes=0.0)
    plan = SimpleNamespace(save=options, run=SimpleNamespace(timeout_minutes=1.0), layout=SimpleNamespace())
    plugins, data = SimpleNamespace(event=lambda name: []), SimpleNamespace(facts={})
    run = Model(plan=plan, rank=0, chunks=[], optimizer=None, plugins=plugins, data=data)
    return module.Saver(run, folder)


def test_a_failure_in_the_background_does_not_cost_the_next_checkpoint(writes):
    """The one on SIGTERM, say: the disk may have been emptied since."""
    from dsplugins.step import Progress

    saver, asked, failing = writes
    failing.add(2)
    assert saver.save(Progress(steps=2)) is None
    told = saver.save(Progress(steps=4))
    assert "checkpoint of step 2" in told and "No space left" in told
    assert asked == [(2, False), (4, True)], "the second one is made at once, while somebody looks"
    assert saver.save(Progress(steps=6)) is None
    saver.close()
    assert asked[-1] == (6, False)


def test_what_is_written_in_the_background_is_the_state_at_save(single, tmp_path, monkeypatch):
    """Weights and plugins go on while the writer is held back."""
    import threading

    import torch
    import torch.distributed as dist

    from dsplugins import saver as module
    from dsplugins.checkpoint import store
    from dsplugins.checkpoint.pieces import Piece
    from dsplugins.step import Progress

    go, saved = threading.Event(), store.save

    def held_back(*given):
        assert go.wait(60)
        return saved(*given)

    monkeypatch.setattr(module.store, "save", held_back)
    live, numbers = torch.full((4, 3), 1.0), [1]
    made = background(tmp_path, monkeypatch, lambda *some: [Piece("weights/x", (4, 3), (0, 0), live, True)])
    made._states["mine"] = SimpleNamespace(version=1, save=lambda: {"numbers": numbers})
    made.save(Progress(steps=2))
    live.fill_(2.0)
    numbers.append(2)
    go.set()
    made.close()
    found, _ = store.newest_good(tmp_path, made._group)
    into = Piece("weights/x", (4, 3), (0, 0), torch.zeros(4, 3), True)
    store.load(found, [into], made._group)
    assert bool((into.data == 1.0).all()), "the writer saw a later step"
    assert found.manifest()["plugins"]["mine"]["state"] == {"numbers": [1]}
    dist.destroy_process_group(made._group)


@pytest.mark.parametrize(("minutes", "later"), [(0.5, 30.0), (2.0, 120.0)])
def test_minutes_are_counted_from_the_last_save(writes, monkeypatch, minutes, later):
    from dsplugins import saver as module
    from dsplugins.step import Progress

    saver, asked, _ = writes
    saver._options.minutes = minutes
    began = saver._saved_at
    clock = SimpleNamespace(monotonic=lambda: clock.now, now=began + later - 1)
    monkeypatch.setattr(module, "time", clock)
    assert not saver.due(1)
    clock.now += 1
    assert saver.due(2)
    saver.save(Progress(steps=2))
    clock.now += later - 1
    assert not saver.due(3)
    clock.now += 1
    assert saver.due(3)
    saver._options.minutes = 0.0
    assert not saver.due(3), "0 saves by steps alone"
    saver._options.every = 3
    assert saver.due(3) and not saver.due(4)


def test_a_disk_that_stays_full_ends_the_run(writes):
    from dsplugins.step import Progress

    saver, _, failing = writes
    failing.update((2, 4))
    saver.save(Progress(steps=2))
    with pytest.raises(EnvironmentUnfit, match="checkpoint of step 4"):
        saver.save(Progress(steps=4))


def test_an_old_checkpoint_that_cannot_go_ends_nothing(writes, monkeypatch):
    from dsplugins import saver as module
    from dsplugins.step import Progress

    def stuck(*some):
        raise OSError(39, "Directory not empty")

    monkeypatch.setattr(module.store, "prune", stuck)
    saver, _, _ = writes
    saver.save(Progress(steps=2))
    saver.close()


def test_state_that_json_cannot_hold_is_its_plugins_fault(writes):
    from dsplugins.failures import HookFailure
    from dsplugins.step import Progress

    saver, asked, _ = writes
    saver._states["mine"] = SimpleNamespace(version=1, save=lambda: {"x": object()})
    with pytest.raises(HookFailure, match="mine"):
        saver.save(Progress(steps=2))
    assert asked == []


def lost(path, fresh=False):
    from dsplugins.rundir import RunDirectory
    from dsplugins.train import Loop

    return Loop._lost(SimpleNamespace(directory=RunDirectory(path)), fresh)


def test_steps_without_a_checkpoint_are_told(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    assert lost(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_text('{"step": 3}\n')
    assert lost(tmp_path) == ["3 steps were taken here before and no checkpoint was finished: starting over"]


@pytest.mark.parametrize("folder", [False, True])
def test_checkpoints_that_are_gone_are_not_started_over(tmp_path, folder):
    """An unmounted disk, or one that was cleared; whether the folder is still there."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 3}\n')
    (tmp_path / "saved.json").write_text('{"step": 2}')
    if folder:
        (tmp_path / "checkpoints").mkdir()
    with pytest.raises(EnvironmentUnfit, match="3 steps were taken .* step 2 was saved, .*: bring it back"):
        lost(tmp_path)
    assert lost(tmp_path, fresh=True) == []


def test_what_could_not_be_saved_is_said_before_the_first_step():
    from dsplugins.failures import HookFailure
    from dsplugins.saver import _states

    unwritable = SimpleNamespace(version=1, save=lambda: {"x": {1, 2}}, load=print)
    with pytest.raises(HookFailure) as told:
        _states([("other", None), ("noisy", unwritable)])
    assert "plugin noisy failed in ds_state" in str(told.value)
