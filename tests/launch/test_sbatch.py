"""What the scripts for Slurm ask of it: lines that sbatch reads, and options of srun."""

from __future__ import annotations

import shlex
from dataclasses import replace

import pytest

from dsplugins.launching.job import Cluster, Job
from dsplugins.launching.templates import fill

SCRIPTS = {"slurm_torchrun.sbatch": "1", "slurm_srun.sbatch": "8"}
"""Template -> tasks on a node."""
CLUSTER = Cluster(nodes=2, grace=120, partition="big", account="mine", time="1:00:00")
JOB = Job("a-run", CLUSTER, 8, 8, "python", "/shared", "runs/a", ("-m", "dsplugins", "train", "a.yaml"))


def asked(text):
    """`--option` -> value, or None, of the lines that sbatch reads: it stops at the first command."""
    found = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            return found
        if line.startswith("#SBATCH "):
            option, _, value = line.removeprefix("#SBATCH ").partition("=")
            assert option not in found
            found[option] = value or None
    raise AssertionError("no command")


def step(text):
    """Words of srun's line, without what it starts."""
    lines = [line for line in text.splitlines() if line.startswith(("step=(", "step+=("))]
    return [word for line in lines for word in shlex.split(line.partition("(")[2].rstrip(")"))]


@pytest.mark.parametrize(("template", "tasks"), SCRIPTS.items())
def test_what_is_asked_of_slurm(template, tasks):
    text = fill(template, JOB)
    assert asked(text) == {
        "--job-name": "a-run",
        "--nodes": "2",
        "--ntasks-per-node": tasks,
        "--gpus-per-node": "8",
        "--exclusive": None,
        "--mem": "0",
        "--output": "%x-%j.out",
        "--open-mode": "append",
        "--requeue": None,
        "--signal": "B:USR1@120",
        "--partition": "big",
        "--account": "mine",
        "--time": "1:00:00",
    }
    assert text.count("#SBATCH") == len(asked(text))  # none below the first command


def test_what_is_not_said_is_the_sites():
    bare = replace(JOB, cluster=Cluster(nodes=2), gpus=0)
    left_out = {"--partition", "--account", "--time", "--gpus-per-node"}
    for template in SCRIPTS:
        assert set(asked(fill(template, JOB))) - set(asked(fill(template, bare))) == left_out


def test_srun_binds_nothing():
    """torchrun's one task has all cores of its node; each task of srun sees all GPUs of its own."""
    common = ["--nodes=2", "--ntasks-per-node={}", "--wait=120"]
    bind = {"slurm_torchrun.sbatch": "--cpu-bind=none", "slurm_srun.sbatch": "--gpu-bind=none"}
    for template, tasks in SCRIPTS.items():
        found = step(fill(template, JOB))
        assert found == ["srun", *(word.format(tasks) for word in common), bind[template]]
    assert step(fill("slurm_srun.sbatch", replace(JOB, gpus=0)))[-1] == "--wait=120"
