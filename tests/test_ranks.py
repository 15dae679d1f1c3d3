"""Real ranks that differ, fail, die or are stopped: exit code, what is said, and `status.json`.

A package that misbehaves is put on the path, with a `sitecustomize` that gives rank 1 an older version of it
or another folder, as on a cluster where one machine was forgotten.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import forks
import pytest

TRAIN = ["-m", "dsplugins", "train", "mine.yaml"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
TINY = Path(__file__).parent / "tiny.yaml"
MODULE = """
import os, signal, time
from dataclasses import dataclass
from dsplugins.hookspecs import hookimpl

RANK = int(os.environ.get("RANK", "-1"))

@dataclass(frozen=True)
class Options:
    how: str = ""
    "What to do in the middle of a step."
    rank: int = -1
    "On which rank; -1: on all."
    stops: bool = False
    "Whether rank 0 asks the launcher to stop, before anything is built."

class Faulty:
    Options = Options
    env = {"FAULTY_NEEDS": "this"}

    def __init__(self, options):
        self.options = options
        if options.stops and RANK == 0:
            os.kill(int(os.environ["DSPLUGINS_LAUNCHER"]), signal.SIGTERM)
            time.sleep(60)

    @hookimpl
    def ds_state(self):
        if self.options.how == "ask early":  # the model is being built
            os.kill(os.getpid(), signal.SIGTERM)

    @hookimpl
    def ds_grads_ready(self, step, chunks):
        assert os.environ["FAULTY_NEEDS"] == "this"
        if self.options.rank not in (-1, RANK):
            return
        if self.options.how == "raise":
            raise ValueError("spoilt")
        if self.options.how == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.options.how == "ask":
            os.kill(os.getpid(), signal.SIGUSR1)
"""
SITE = """
import os, sys
if os.environ.get("RANK") == "1":
    sys.path[:0] = os.environ.get("FORGOTTEN", "").split()
    os.chdir(os.environ.get("ELSEWHERE", "."))
"""
RECIPE = f"""
extends: [{TINY}]
plugins: {{faulty: {{}}}}
train: {{steps: 1}}
evaluate: {{sequences: 0}}
run: {{world_size: 2, directory: "${{oc.env:OUT}}"}}
"""


def distribution(folder, version):
    information = folder / f"faulty-{version}.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: faulty\nVersion: {version}\n")
    (information / "entry_points.txt").write_text("[dsplugins.event]\nfaulty = faulty:Faulty\n")
    return folder


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder for PYTHONPATH; its `forgotten` holds the older version."""
    folder = distribution(tmp_path_factory.mktemp("site"), "1.1")
    distribution(folder / "forgotten", "1.0")
    (folder / "faulty.py").write_text(MODULE)
    (folder / "sitecustomize.py").write_text(SITE)
    return folder


class Place:
    """A folder with a recipe, in which to start ranks."""

    def __init__(self, folder, site):
        self.folder, self.out = folder, folder / "out"
        self.recipe(folder)
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(site),
            "OUT": str(self.out),
            "OMP_NUM_THREADS": "1",
        }

    @staticmethod
    def recipe(folder, more=""):
        folder.mkdir(exist_ok=True)
        (folder / "mine.yaml").write_text(RECIPE + more)

    def train(self, *overrides, **environment):
        """Code and output of `dsplugins train`."""
        return self._run(forks.run, [*TRAIN, *overrides], environment)

    def torchrun(self, *overrides, run=forks.run, **environment):
        """Code and output of the same in two processes of torchrun's."""
        return self._run(run, [*TORCHRUN, *TRAIN, *overrides], environment)

    def _run(self, run, line, environment):
        done = run([sys.executable, *line], cwd=self.folder, env=self.environment | environment)
        return done.returncode, done.stdout + done.stderr

    @property
    def status(self):
        return json.loads((self.out / "status.json").read_text())


@pytest.fixture
def place(tmp_path, site):
    return Place(tmp_path, site)


def test_another_version_of_a_plugin_on_one_rank(place, site):
    code, said = place.train(FORGOTTEN=str(site / "forgotten"))
    assert code == place.status["code"] == 4, said
    assert said.count("this machine can't run it: ranks 1 have other plugins than rank 0") == 1
    assert "ranks 1 have other plugins than rank 0" in place.status["reason"]
    assert "Traceback" not in said and not (place.out / "metrics.jsonl").exists()


def test_a_hook_that_raises_is_named_on_every_rank(place):
    code, said = place.train("plugins.faulty.how=raise")
    assert code == place.status["code"] == 1, said
    for rank in range(2):
        assert f"rank {rank}: plugin faulty failed in ds_grads_ready: ValueError: spoilt at " in said
    assert "plugin faulty failed in ds_grads_ready: ValueError: spoilt" in place.status["reason"]
    assert "Traceback" not in said


def test_a_hook_that_raises_on_one_rank_ends_the_others(place):
    code, said = place.train("plugins.faulty.how=raise", "plugins.faulty.rank=1")
    assert code == place.status["code"] == 1, said
    assert place.status["reason"].startswith("rank 1: plugin faulty failed in ds_grads_ready")
    assert "Traceback" not in said


def test_a_killed_rank_is_the_reason_not_what_others_make_of_it(place):
    code, said = place.train("plugins.faulty.how=die", "plugins.faulty.rank=1")
    assert code == place.status["code"] == 1, said
    assert place.status["reason"] == "rank 1 was killed by SIGKILL (out of memory?)"
    assert "exit code 1: rank 1 was killed by SIGKILL" in said


def test_a_signal_that_reaches_one_rank_stops_all_and_is_named(place):
    code, said = place.train("plugins.faulty.how=ask", "plugins.faulty.rank=1", "train.steps=2")
    assert code == place.status["code"] == 75, said
    assert said.count("stopped by SIGUSR1 after step 1, saved in ") == 2, said
    assert place.status["reason"].startswith("stopped by SIGUSR1 after step 1, saved in ")


def test_a_signal_before_the_first_step_stops_after_it(place):
    code, said = place.train("plugins.faulty.how='ask early'", "plugins.faulty.rank=1", "train.steps=2")
    assert code == place.status["code"] == 75, said
    assert place.status["reason"].startswith("stopped by SIGTERM after step 1, saved in ")


def test_a_launcher_that_is_told_to_stop(place):
    """While its ranks import: nothing is lost, and whoever starts runs again after a 75 is to do so."""
    code, said = place.train("plugins.faulty.stops=true")
    assert code == place.status["code"] == 75, said
    expected = "stopped by SIGTERM before it took a step: give the same command again"
    assert place.status["reason"] == expected and said.count(expected) == 1


def test_torchrun_starts_the_same_run(place):
    """Without what the plugin needs, which is set before torch is imported: that takes a new interpreter."""
    interpreters = partial(subprocess.run, capture_output=True, text=True, timeout=300)
    code, said = place.torchrun(run=interpreters)
    assert code == 0, said
    assert place.status["code"] == 0 and place.status["steps"] == 1
    assert said.count("environment: FAULTY_NEEDS=this (faulty)") == 1
    code, said = place.torchrun(FAULTY_NEEDS="this")
    assert code == 0 and said.count("this run is complete (1 steps)") == 1


def test_an_environment_that_contradicts_a_plugin(place):
    code, said = place.train(FAULTY_NEEDS="that")
    assert code == 4, said
    assert "FAULTY_NEEDS is 'that', plugin faulty needs 'this': export FAULTY_NEEDS=this, or unset it" in said
    assert not place.out.exists()


def test_torchrun_and_another_recipe_on_one_rank(place, tmp_path):
    place.recipe(tmp_path / "elsewhere", "optimizer: {clip_grad: 2.0}\n")
    code, said = place.torchrun(ELSEWHERE=str(tmp_path / "elsewhere"), FAULTY_NEEDS="this")
    assert code == 1 and place.status["code"] == 4, said
    assert "ranks 1 have other recipe than rank 0" in place.status["reason"]


def test_torchrun_and_a_recipe_that_is_refused(place):
    code, said = place.torchrun("train.stepz=3")
    assert code == 1 and place.status["code"] == 3, said
    assert place.status["reason"].startswith("command line: train.stepz is not an option")
    assert said.count("did you mean steps") == 1
