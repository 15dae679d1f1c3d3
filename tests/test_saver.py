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
    assert progress.steps == 0 and told == [] and not folder.exists()
