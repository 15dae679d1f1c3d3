"""`dsplugins launch`: what is asked for, what it writes and says, and to whom it hands it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from dsplugins.cli import launch
from dsplugins.contracts import EnvironmentUnfit, RecipeError

TINY = str(Path(__file__).parents[1] / "tiny.yaml")
KUBERNETES = ["--on", "kubernetes", "--image", "registry/image:1", "--shared", "claim:/data"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Call it in an empty folder; `programs` is on the path, and nothing else is."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "programs").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "programs"))

    def call(*arguments, code=0):
        line = [TINY, "run.world_size=4", "--nodes", "2", *arguments]
        done = CliRunner().invoke(launch.command, line, catch_exceptions=False)
        assert done.exit_code == code, done.output
        return done

    return call


def program(name):
    file = Path("programs", name)
    file.write_text(f'#!/bin/bash\necho "{name} $*" > called\n')
    file.chmod(0o755)


@pytest.mark.parametrize(("target", "name", "called"), [("slurm", "sbatch", "sbatch tiny.sbatch\n")])
def test_slurm_is_written_and_submitted(run, target, name, called):
    program(name)
    said = run("--on", target, "--partition", "big", "--account", "mine").stderr
    assert Path("called").read_text() == called
    text = Path("tiny.sbatch").read_text()
    assert "#SBATCH --nodes=2\n" in text and "--nproc-per-node=2 " in text
    assert "#SBATCH --partition=big\n" in text and "#SBATCH --account=mine\n" in text
    assert "gpus-per-node" not in text  # the recipe names the plugin cpu
    assert said.splitlines() == [
        "nodes: 2, ranks on each: 2; run directory: runs/tiny",
        "environment: nothing that a plugin asks for",
    ]


@pytest.mark.parametrize(("way", "kinds"), [([], ["TrainingRuntime", "TrainJob"]), (["jobset"], ["JobSet"])])
def test_kubernetes_is_written_and_applied(run, way, kinds):
    program("kubectl")
    run(*KUBERNETES, *(["--by", *way] if way else []), "--out", "mine.yaml")
    assert Path("called").read_text() == "kubectl apply -f mine.yaml\n"
    assert [each["kind"] for each in yaml.safe_load_all(Path("mine.yaml").read_text())] == kinds


def test_a_dry_run_prints_and_leaves_nothing(run):
    program("sbatch")
    printed = run("--on", "slurm", "--dry-run").stdout
    assert printed.startswith("#!/usr/bin/env bash\n") and printed.endswith('exit "${code:-1}"\n')
    assert [file.name for file in Path().iterdir()] == ["programs"]


def test_torchrun_lines_are_printed(run):
    printed = run("--on", "torchrun").stdout
    assert printed.count("torch.distributed.run") == 2 and "--node-rank=1" in printed
    assert [file.name for file in Path().iterdir()] == ["programs"]


@pytest.mark.parametrize(
    ("where", "directory", "remedy"),
    [
        (["--on", "slurm", "--image", "a"], "runs/tiny", "mount the folder that it belongs in with --shared"),
        (["--on", "slurm", "--image", "a", "--shared", "/data"], "../out", "a folder below --shared, /data"),
        (KUBERNETES, "/database/out", "a folder below --shared, /data"),
    ],
)
def test_a_run_that_would_end_with_its_container_is_refused(run, where, directory, remedy):
    with pytest.raises(RecipeError) as raised:
        run(*where, f"run.directory={directory}")
    (problem,) = raised.value.problems
    assert problem.message == f"run.directory={directory} lies inside the container, and ends with it"
    assert problem.key == "run.directory" and problem.remedy.endswith(remedy)


@pytest.mark.parametrize("directory", ["runs/tiny", "/data/out", "../data/out"])
def test_a_run_that_the_container_shares_is_not(run, directory):
    shared = ["--on", "slurm", "--image", "a", "--shared", "/data", "--dry-run"]
    printed = run(*shared, f"run.directory={directory}").stdout
    assert "--container-mounts=/data:/data)\n" in printed and f"\nrun={directory}\n" in printed


def test_what_plugins_need_is_printed_and_exported(run, monkeypatch):
    from dsplugins.plugins.event.curves import Curves

    monkeypatch.setattr(Curves, "env", {"CUDA_DEVICE_MAX_CONNECTIONS": "32"})
    done = run("plugins.curves={}", "--on", "slurm", "--dry-run")
    assert "environment: CUDA_DEVICE_MAX_CONNECTIONS=32 (curves)\n" in done.stderr
    assert "\nexport CUDA_DEVICE_MAX_CONNECTIONS=32\n" in done.stdout


def test_gpus_where_the_platform_is_cuda(run):
    printed = run("plugins.cpu=null", "plugins.cuda={}", "--on", "slurm", "--dry-run").stdout
    assert "#SBATCH --gpus-per-node=2\n" in printed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--processes-per-node", "8"], "2 nodes of 8 processes are 16, but run.world_size=4"),
        (["run.world_size=1"], "run.world_size=1 can't be shared out evenly among 2 nodes"),
        (["train.stepz=3"], "train.stepz is not an option"),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused(run, arguments, said):
    with pytest.raises(RecipeError, match=said):
        run("--on", "slurm", *arguments)
    assert not Path("tiny.sbatch").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--on", "slurm", "--by", "jobset"], "--by jobset is no way to start on slurm: torchrun or srun"),
        (["--on", "kubernetes", "--image", "a"], "--shared CLAIM:FOLDER"),
        (["--on", "slurm", "--partition", "a\n#SBATCH --wrap=x"], "has characters other than"),
    ],
)
def test_usage(run, arguments, said):
    assert said in run(*arguments, code=2).stderr


def test_a_machine_without_slurm_keeps_the_file(run):
    with pytest.raises(EnvironmentUnfit, match="tiny.sbatch is written, but there is no sbatch here"):
        run("--on", "slurm")
    assert Path("tiny.sbatch").exists()


def test_a_refusal_of_slurm_is_one_of_ours(run):
    Path("programs", "sbatch").write_text("#!/bin/bash\nexit 1\n")
    Path("programs", "sbatch").chmod(0o755)
    with pytest.raises(EnvironmentUnfit, match="sbatch tiny.sbatch ended with code 1"):
        run("--on", "slurm")
