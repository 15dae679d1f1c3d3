"""Ranks of several nodes that shouldn't start: said on every rank, so that nobody waits for nobody."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from dsplugins.contracts import EnvironmentUnfit

START = """
from types import SimpleNamespace as S
from dsplugins import process_group
process_group.start(S(distributed_backend="gloo"), S(run=S(timeout_minutes=1)))
"""


def fit(folders, numbers, file=None):
    """What a rank is told that sees `folders[rank]` and whose node has these numbers; None if all is well."""
    import torch

    from dsplugins import process_group

    me = torch.distributed.get_rank()
    given, known = numbers[me]
    told = {"RANK": me, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 1, "GROUP_RANK": given, "SLURM_NODEID": known}
    before = dict(os.environ)
    os.environ |= {name: str(value) for name, value in told.items()}
    try:
        if file:
            process_group.nodes_see(Path(folders[me], file))
        else:
            process_group.nodes_fit(Path(folders[me]))
    except EnvironmentUnfit as error:
        return str(error)
    finally:
        os.environ.clear()
        os.environ.update(before)
    return None


@pytest.fixture
def nodes(workers, tmp_path):
    def ask(folders=("out", "out"), numbers=((0, 0), (1, 1)), file=None):
        return workers(2).run(fit, [str(tmp_path / each) for each in folders], numbers, file)

    return ask


def test_nodes_that_fit_leave_nothing_behind(nodes, tmp_path):
    assert nodes() == [None, None]
    assert list((tmp_path / "out").iterdir()) == []


def test_a_run_directory_that_is_not_shared(nodes, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    first, second = nodes(folders=("out", "elsewhere"))
    assert first.startswith(f"run.directory {tmp_path / 'out'} is not the same folder everywhere: ranks 1 (")
    assert (
        second.startswith(f"run.directory {tmp_path / 'elsewhere'} is not")
        and "that all nodes share" in second
    )


def test_a_run_that_stands_somewhere_is_seen_by_all_or_refused(nodes, tmp_path):
    """Without a mark: whoever only looks writes nothing."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe").touch()
    assert nodes(folders=("run", "run"), file="recipe") == [None, None]
    first, second = nodes(folders=("run", "out"), file="recipe")
    assert "is not the same folder everywhere: ranks 1 (" in first and "same folder" in second
    assert [each.name for each in tmp_path.rglob("*")] == ["run", "recipe"]


def test_a_run_directory_that_rank_0_can_not_make(nodes, tmp_path):
    (tmp_path / "file").touch()
    first, second = nodes(folders=("file/out", "out"))
    assert (
        first
        == second
        == f"run.directory {tmp_path / 'file/out'} can't be written by rank 0: Not a directory"
    )


def test_shuffled_nodes(nodes):
    first, second = nodes(numbers=((0, 1), (1, 0)))
    assert first == second
    assert first.startswith(
        "nodes are shuffled, node 1 is node 0 of torchrun, node 0 is node 1 of torchrun: "
    )
    assert "--node-rank" in first


def test_numbers_that_mean_other_things(nodes):
    """Several torchruns a node; a JobSet of jobs with one pod each, all of index 0."""
    assert nodes(numbers=((0, 0), (1, 0))) == [None, None]


def test_a_port_in_use():
    with socket.create_server(("localhost", 0)) as server:
        port = str(server.getsockname()[1])
        master = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        line = [sys.executable, "-c", START]
        done = subprocess.run(line, env=os.environ | master, capture_output=True, text=True, timeout=120)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1
    assert (
        last.startswith(f"dsplugins.contracts.EnvironmentUnfit: port {port} of ")
        and "set MASTER_PORT" in last
    )
