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
