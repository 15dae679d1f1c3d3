"""What a process reads of itself from the variables of srun and torchrun."""

from __future__ import annotations

import os
import signal

import pytest

from dsplugins import rank
from dsplugins.contracts import EnvironmentUnfit

VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "GROUP_RANK",
)
STEP = {
    "SLURM_STEP_NUM_TASKS": "20",
    "SLURM_STEP_NUM_NODES": "3",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2),4",
    "SLURM_PROCID": "17",
    "SLURM_NODEID": "2",
    "SLURM_LOCALID": "1",
}
MASTER = {"MASTER_ADDR": "node-0", "MASTER_PORT": "20001"}


@pytest.fixture
def variables(monkeypatch):
    """A copy of the environment without any of this; a function that adds to it."""
    kept = {k: v for k, v in os.environ.items() if k not in VARIABLES and not k.startswith("SLURM_")}
    monkeypatch.setattr(os, "environ", kept)
    return kept.update


def test_a_task_of_several_is_a_rank(variables):
    variables(STEP | MASTER)
    rank.adopt_srun()
    found = {name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    assert found == {"RANK": "17", "LOCAL_RANK": "1", "WORLD_SIZE": "20", "LOCAL_WORLD_SIZE": "4"}
    assert rank.inside_torchrun() and rank.several_nodes()


@pytest.mark.parametrize(
    "given",
    [
        {},
        {**STEP, "SLURM_STEP_NUM_TASKS": "1"},  # it starts its ranks itself
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "20"},  # the batch script, outside of any step
        {**STEP, "RANK": "3", "WORLD_SIZE": "4"},  # torchrun in a task
    ],
)
def test_who_is_none_or_is_one_already_stays_so(variables, given):
    variables(given)
    before = dict(os.environ)
    rank.adopt_srun()
    assert os.environ == before


@pytest.mark.parametrize("lacking", [["MASTER_ADDR"], ["MASTER_ADDR", "MASTER_PORT"]])
def test_tasks_need_a_place_to_meet(variables, lacking):
    variables(STEP | {name: value for name, value in MASTER.items() if name not in lacking})
    with pytest.raises(EnvironmentUnfit, match=f"20 tasks.*without {' and '.join(lacking)}: export"):
        rank.adopt_srun()


@pytest.mark.parametrize(("agents", "refused"), [("1", True), ("3", True), ("20", False)])
def test_torchruns_that_do_not_know_of_each_other(variables, agents, refused):
    variables(STEP | {"GROUP_WORLD_SIZE": agents, "LOCAL_WORLD_SIZE": "8"})
    if refused:
        with pytest.raises(EnvironmentUnfit, match="20 tasks on 3 nodes.* 8 ranks.* 160 processes"):
            rank.refuse_doubled()
    else:
        rank.refuse_doubled()


@pytest.mark.parametrize("launched", [True, False])
def test_interrupts_are_left_to_a_launcher_only(monkeypatch, launched):
    """Until the run listens, Ctrl-C ends a rank without a traceback or a word; a handler of its own stays."""
    monkeypatch.setattr(rank, "has_launcher", lambda: launched)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        rank.leave_interrupts_to_launcher()
        expected = signal.SIG_DFL if launched else signal.default_int_handler
        assert signal.getsignal(signal.SIGINT) is expected
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        rank.leave_interrupts_to_launcher()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
