"""`dsplugins launch --on slurm` with a Slurm that pretends, on "nodes" that are this machine: real runs."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from dsplugins.rundir import RunDirectory

TINY = Path(__file__).parents[1] / "tiny.yaml"
FAKE = Path(__file__).with_name("fake_slurm.py")
SETUP = ["parallel.expert=2", "train.micro_batch=2", "train.steps=12"]
RECIPE = [str(TINY), "run.world_size=2", "run.directory=out", "evaluate.sequences=0", *SETUP]


class Cluster:
    """A folder with the fake programs; everything is started there."""

    def __init__(self, folder):
        self.folder, programs = folder, folder / "bin"
        programs.mkdir()
        for name in ("sbatch", "srun", "scontrol"):
            (programs / name).write_text(f'#!/bin/bash\nexec "{sys.executable}" "{FAKE}" {name} "$@"\n')
            (programs / name).chmod(0o755)
        self.environment = {
            **os.environ,
            "PATH": f"{programs}:{os.environ['PATH']}",
            "FAKE_FOLDER": str(folder),
            "OMP_NUM_THREADS": "1",
        }

    def run(self, line, **environment):
        """(exit code, what was printed)."""
        done = subprocess.run(
            line,
            cwd=self.folder,
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
        )
        return done.returncode, done.stdout

    def launch(self, *arguments, **environment):
        """Codes of the job's attempts, and what was printed."""
        line = [sys.executable, "-m", "dsplugins", "launch", *arguments, "--nodes", "2", "--on", "slurm"]
        code, said = self.run(line, **environment)
        assert code == 0, said
        return [int(word) for word in (self.folder / "codes").read_text().split()], said

    def step(self, code, more="", again=0, always=False):
        """From now on srun starts nothing: it leaves `code` in the run's status.json, as a rank does.

        With None it says nothing. `more` is shell code of the first attempt; later ones leave `again`, unless
        they are `always` the same.
        """
        later = "" if always else f'[ "$SLURM_RESTART_COUNT" = 0 ] || {{ {self._word(again)}exit 1; }}\n'
        (self.folder / "bin" / "srun").write_text(f"#!/bin/bash\n{later}{self._word(code)}{more}exit 1\n")

    @staticmethod
    def _word(code):
        if code is None:
            return ""
        with tempfile.TemporaryDirectory() as folder:
            RunDirectory(Path(folder)).end(code, "so it is")
            said = (Path(folder) / "status.json").read_text()
        return f"cat >out/status.json <<'END'\n{said}END\n"

    def losses(self):
        rows = [json.loads(line) for line in (self.folder / "out" / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
        return [row["loss"] for row in rows]

    @property
    def status(self):
        return json.loads((self.folder / "out" / "status.json").read_text())


@pytest.fixture
def cluster(tmp_path):
    return Cluster(tmp_path)


@pytest.fixture(scope="module")
def on_one_node(workers):
    """Losses of the same run, by two ranks of one node."""
    from runs import trained

    return [row["loss"] for row in workers(2).run(trained, SETUP)[0]["rows"]]


def test_two_nodes_with_torchrun_stopped_requeued_and_the_same_as_one(cluster, on_one_node):
    codes, said = cluster.launch(
        *RECIPE, "--time", "1:00:00", FAKE_TIME_IS_OVER=str(cluster.folder / "out" / "metrics.jsonl")
    )
    assert codes == [75, 0], said
    assert cluster.status["code"] == 0 and cluster.status["steps"] == 12
    assert "stopped by SIGUSR1 after step" in said and "Submitted batch job 4242" in said
    assert cluster.losses() == on_one_node
    submitted = (cluster.folder / "tiny.sbatch").read_text()
    assert submitted == (cluster.folder / "submitted").read_text()
    assert "#SBATCH --time=1:00:00\n" in submitted and "#SBATCH --signal=B:USR1@300\n" in submitted


def test_tasks_of_srun_are_ranks(cluster, on_one_node):
    codes, said = cluster.launch(*RECIPE, "train.steps=2", "--by", "srun")
    assert codes == [0], said
    assert "torch.distributed.run" not in (cluster.folder / "submitted").read_text()
    assert cluster.losses() == on_one_node[:2]
    evaluate = [sys.executable, "-m", "dsplugins", "evaluate", "out", "evaluate.sequences=8", "--json"]
    where = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(20000 + os.getpid() % 10000)}
    code, said = cluster.run(["srun", "--nodes=2", "--ntasks-per-node=1", *evaluate], **where)
    assert code == 0 and '"sequences": 8' in said, said


def test_several_torchruns_on_a_node_are_refused(cluster):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
    train = ["-m", "dsplugins", "train", str(TINY), "run.directory=out"]
    code, said = cluster.run(["srun", "--nodes=1", "--ntasks-per-node=2", *torchrun, *train])
    assert code == 1 and cluster.status["code"] == 4, said
    assert "srun started 2 tasks on 1 node, and torchrun in each of them 1 rank" in cluster.status["reason"]
    assert "--ntasks-per-node=1 for torchrun" in said


def test_tasks_that_could_not_find_each_other_are_refused(cluster):
    train = [sys.executable, "-m", "dsplugins", "train", str(TINY), "run.directory=out"]
    code, said = cluster.run(["srun", "--nodes=1", "--ntasks-per-node=2", *train])
    assert code == 4 and "without MASTER_ADDR and MASTER_PORT" in said, said


def test_a_job_that_is_cancelled_is_not_requeued(cluster):
    """Slurm sends SIGTERM to the steps and to the script; the run saves, and nothing comes back."""
    cluster.step(75, "kill -TERM $PPID\nsleep 0.1\n")
    codes, said = cluster.launch(*RECIPE)
    assert codes == [-15] and cluster.status["code"] == 75, said


STEP = """echo "{\\"step\\": 1, \\"time\\": $(date +%s).5}" > out/metrics.jsonl\n"""
TIME_IS_OVER, STOP = "kill -USR1 $PPID\nexec sleep 9\n", "kill -USR2 $PPID\nexec sleep 9\n"
"""To the script, which hands it on to srun: that ends in its sleep, as what still starts does."""


def test_a_job_whose_time_is_over_while_it_starts_is_requeued(cluster):
    cluster.step(None, TIME_IS_OVER)
    codes, said = cluster.launch(*RECIPE)
    assert codes == [75, 0], said


@pytest.mark.parametrize(("code", "before"), [(3, ""), (None, STEP)], ids=["a verdict", "a step"])
def test_the_time_limit_changes_no_verdict_and_hides_no_loss(cluster, code, before):
    """After a step the run has to save: without a word of that it has crashed."""
    cluster.step(code, before + TIME_IS_OVER)
    codes, said = cluster.launch(*RECIPE)
    assert codes[0] == (code or 1), said


@pytest.mark.parametrize("code", [75, None])
def test_a_job_that_is_stopped_by_usr2_is_not_requeued(cluster, code):
    """`scancel --batch --signal=USR2`: the run saves, or was still starting."""
    cluster.step(code, STOP)
    codes, said = cluster.launch(*RECIPE)
    assert codes == [75] and "USR2 asked for no further start; submit it again to go on" in said, said


def test_a_time_limit_after_a_stop_does_not_undo_it(cluster):
    both = "trap : USR1\nkill -USR2 $PPID\nsleep 0.3\nkill -USR1 $PPID\nsleep 0.3\n"
    cluster.step(75, both)
    codes, said = cluster.launch(*RECIPE)
    assert codes == [75], said


def test_what_ranks_are_told_of_their_run(cluster):
    """A recipe that isn't there on the nodes ends them before it could name a run directory."""
    train = f'"{sys.executable}" -m dsplugins train no_such.yaml'
    (cluster.folder / "bin" / "srun").write_text(f"#!/bin/bash\n{train}\nexit 1\n")
    codes, said = cluster.launch(*RECIPE)
    assert codes == [3] and cluster.status["code"] == 3, said


def test_a_port_in_use(cluster):
    with socket.create_server(("localhost", 0)) as server:
        port = str(server.getsockname()[1])
        codes, said = cluster.launch(*RECIPE, MASTER_PORT=port)
    assert codes == [4], said
    assert f"port {port} of localhost is in use: sbatch --export=ALL,MASTER_PORT=" in said
    assert not (cluster.folder / "out" / "status.json").exists()


def test_a_run_directory_that_can_not_be_written(cluster):
    (cluster.folder / "out").write_text("in the way")
    codes, said = cluster.launch(*RECIPE)
    assert codes == [4] and "run.directory out can't be written on " in said, said


@pytest.mark.parametrize("code", [2, 3, 4])
def test_what_would_end_the_same_again_is_not_requeued(cluster, code):
    """What an earlier attempt left in status.json is not taken for this one's."""
    run = RunDirectory(cluster.folder / "out")
    run.announce()
    run.end(75, "stopped early")
    cluster.step(code)
    codes, said = cluster.launch(*RECIPE)
    assert codes == [code], said
    assert not list((cluster.folder / "out").glob("began-*"))


CHECKPOINT = "[ $SLURM_RESTART_COUNT != {0} ] || mkdir -p out/checkpoints/step-0000000{0}\n"


@pytest.mark.parametrize("code", [1, None])
@pytest.mark.parametrize(("retries", "further", "attempts"), [(0, [], 1), (2, [], 3), (2, [1, 2], 5)])
def test_crashes_are_requeued_until_the_run_gets_no_further(cluster, code, retries, further, attempts):
    """With checkpoints after the starts 1 and 2, counting begins anew at each."""
    cluster.step(code, "".join(map(CHECKPOINT.format, further)), always=True)
    codes, said = cluster.launch(*RECIPE, "--retries", str(retries))
    assert codes == [1] * attempts, said
    newest = "step-00000002" if further else "none"
    assert f"crash {retries + 1} with newest checkpoint {newest}; --retries {retries}\n" in said
    assert said.count("no further start; submit it again to go on") == 1


def test_another_job_counts_anew(cluster):
    cluster.step(None)
    (cluster.folder / "out").mkdir()
    (cluster.folder / "out" / "crashes").write_text("4241 none\n" * 9)
    codes, said = cluster.launch(*RECIPE)
    assert codes == [1, 0], said


def test_a_crash_after_a_stop_by_usr2_is_not_requeued(cluster):
    cluster.step(1, STOP)
    codes, said = cluster.launch(*RECIPE)
    assert codes == [1], said


def test_a_job_beside_a_run_that_is_under_way_leaves_it_its_status(cluster):
    run = RunDirectory(cluster.folder / "out")
    run.announce()
    before = run.status()
    with run.held():
        codes, said = cluster.launch(*RECIPE)
    assert codes == [4] and "a run is under way in out, by process " in said, said
    assert run.status() == before
