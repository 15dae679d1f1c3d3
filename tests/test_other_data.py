"""A run goes on with the data that it was trained on, or not without being told to."""

from __future__ import annotations

import sys
from pathlib import Path

import forks
import pytest

TINY = Path(__file__).parent / "tiny.yaml"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with `sources`, and `out`, a run on them."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "sources").mkdir()
    for number in range(24):
        text = "".join(f"def f{number}_{line}(x):\n    return x + {line}\n" for line in range(40))
        (folder / "sources" / f"m{number}.py").write_text(text)
    assert again(folder).returncode == 0
    return folder


def again(folder, *options, command="train", overrides=()):
    """The same command once more, as if the run had died before its end."""
    (folder / "out" / "run.json").unlink(missing_ok=True)
    what = ["out"] if command == "evaluate" else [str(TINY), "run.directory=out", "train.steps=2"]
    what += ["plugins.python_source.directory=sources", *overrides]
    return forks.run([sys.executable, "-m", "dsplugins", command, *options, *what], cwd=folder)


def test_the_same_data_is_not_mentioned(place):
    done = again(place)
    assert done.returncode == 0 and "resumed from out/checkpoints/step-00000002" in done.stdout
    assert "data digest" not in done.stdout


def test_other_data_is_refused_told_and_accepted(place):
    (place / "sources" / "m0.py").write_text("x = 1\n" * 50)
    done = again(place)
    assert done.returncode == 3 and "was trained on other data: data digest: " in done.stderr
    assert "--accept-changes goes on with it" in done.stderr
    looked = again(place, command="evaluate")
    assert looked.returncode == 0 and "other than in the run: data digest: " in looked.stdout
    done = again(place, "--accept-changes")
    assert done.returncode == 0 and "accepted: data digest: " in done.stdout
