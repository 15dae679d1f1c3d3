"""`dsplugins launch`: what is asked for, what it writes and says, and to whom it hands it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from dsplugins.cli import launch
from dsplugins.cli.launch_options import seconds
from dsplugins.cli.train import _complete, prepared
from dsplugins.contracts import EnvironmentUnfit, RecipeError
from dsplugins.recipe import Recipe
from dsplugins.rundir import RunDirectory

TINY = str(Path(__file__).parents[1] / "tiny.yaml")
FOUR = ["run.world_size=4", "train.micro_batch=2"]
KUBERNETES = ["--on", "kubernetes", "--image", "registry/image:1", "--shared", "claim:/data"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Call it in an empty folder; `programs` is on the path, and nothing else is."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "programs").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "programs"))

    def call(*arguments, code=0):
        line = [TINY, *FOUR, "--nodes", "2", *arguments]
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
        "data: python_source (Python's standard library)",
        "environment: nothing that a plugin asks for",
    ]


@pytest.mark.parametrize(("way", "kinds"), [([], ["TrainingRuntime", "TrainJob"]), (["jobset"], ["JobSet"])])
def test_kubernetes_is_written_and_applied(run, way, kinds):
    program("kubectl")
    run(*KUBERNETES, *(["--by", *way] if way else []), "--out", "mine.yaml")
    assert Path("called").read_text() == "kubectl apply -f mine.yaml\n"
    assert [each["kind"] for each in yaml.safe_load_all(Path("mine.yaml").read_text())] == kinds


def begun(directory, *overrides, **lock):
    """A run of two nodes that took a step; `lock` is what its plugins' lock says instead of the truth."""
    recipe = Recipe.load(TINY, [*FOUR, *overrides])
    run = RunDirectory(Path(directory))
    run.start(recipe, prepared(recipe)[0])
    run.log({"step": 1})
    file = run.path / "plugins.lock.json"
    kept = json.loads(file.read_text())
    kept["plugins"] = [{**each, **lock} for each in kept["plugins"]]
    file.write_text(json.dumps(kept))


def refused(run, *arguments):
    """Each reason for a refusal, without its remedy; none where it is written."""
    try:
        run(*arguments, "--dry-run")
    except RecipeError as raised:
        remedy = "--accept-changes goes on with it, run.directory=... begins beside it"
        assert {problem.remedy for problem in raised.problems} == {remedy}
        return [problem.message for problem in raised.problems]
    return []


def test_another_recipe_over_a_run_is_refused_before_it_waits_in_the_queue(run):
    program("sbatch")
    begun("runs/tiny")
    with pytest.raises(RecipeError) as raised:
        run("--on", "slurm", "train.steps=99")
    (problem,) = raised.value.problems
    assert problem.message == "runs/tiny holds a run with another train.steps: 5 -> 99"
    recipe = Recipe.load(TINY, [*FOUR, "train.steps=99"])
    with pytest.raises(RecipeError) as trained:
        _complete(RunDirectory(Path("runs/tiny")), recipe, prepared(recipe)[0], fresh=False, accept=False)
    assert [each.message for each in trained.value.problems] == [problem.message]
    assert not Path("called").exists() and not Path("tiny.sbatch").exists()
    run("--on", "slurm", "train.steps=99", "--accept-changes")
    assert f" -m dsplugins train --accept-changes {TINY} " in Path("tiny.sbatch").read_text()
    assert Path("called").exists()


@pytest.mark.parametrize("target", [KUBERNETES, ["--on", "slurm", "--image", "a", "--shared", "/data"]])
def test_where_a_container_looks_for_the_recipe_is_told(tmp_path, monkeypatch, target):
    """One that comes with dsplugins is wherever that is."""
    monkeypatch.chdir(tmp_path)
    for name in ("mine.yaml", "../mine.yaml"):
        Path(name).write_text(f"extends: [{TINY}]\n")
        done = CliRunner().invoke(launch.command, [name, *FOUR, "--nodes", "2", *target, "--dry-run"])
        inside = {"mine.yaml": "/data/mine.yaml", "../mine.yaml": "/mine.yaml"}[name]
        assert f"recipe: the container has to have {inside}, and what it extends\n" in done.stderr
    shipped = ["deepseek_v3/tiny_cpu.yaml", "--nodes", "1", *target, "--dry-run"]
    assert "recipe:" not in CliRunner().invoke(launch.command, shipped, catch_exceptions=False).stderr


@pytest.mark.parametrize("target", ["slurm", "torchrun"])
def test_a_run_that_goes_on_as_it_was_is_written(run, target):
    begun("runs/tiny")
    assert refused(run, "--on", target) == []
    assert refused(run, "--on", target, "train.seed=7") != []
    assert refused(run, "--on", target, "train.seed=7", "run.directory=beside") == []


def test_a_run_in_a_shared_folder_is_looked_at_there(run, tmp_path):
    """Its plugins are the image's: only here another version says nothing."""
    begun("data/runs/tiny", version="0.0.7")
    kubernetes = [*KUBERNETES[:-1], f"claim:{tmp_path}/data"]
    for where in (kubernetes, ["--on", "slurm", "--image", "a", "--shared", f"{tmp_path}/data"]):
        assert refused(run, *where) == []
        (said, *_) = refused(run, *where, "train.seed=7")
        assert said.startswith(f"{tmp_path}/data/runs/tiny holds a run with another train.seed: ")
        assert any("curves (from): absent" in each for each in refused(run, *where, "plugins.curves={}"))


def test_a_damaged_run_is_told(run):
    begun("runs/tiny")
    Path("runs/tiny/plugins.lock.json").write_text("")
    with pytest.raises(RecipeError, match="is empty") as raised:
        run("--on", "slurm", "--dry-run")
    assert raised.value.problems[0].place == "runs/tiny/plugins.lock.json"


@pytest.mark.parametrize(("given", "retries"), [([], 3), (["--retries", "0"], 0), (["--retries", "50"], 50)])
def test_retries_reach_both_schedulers(run, given, retries):
    script = run("--on", "slurm", "--dry-run", *given).stdout
    assert f'[ "$crashes" -le {retries} ]\n' in script
    jobset = yaml.safe_load(run(*KUBERNETES, "--by", "jobset", "--dry-run", *given).stdout)
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == retries


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
        (["--on", "torchrun", "--by", "srun"], "--by srun is no way to start on torchrun: leave out --by"),
        (["--on", "kubernetes", "--image", "a"], "--shared CLAIM:FOLDER"),
        ([*KUBERNETES[:-1], "C_LAIM:/data"], "C_LAIM is no name of Kubernetes', which has small letters"),
        ([*KUBERNETES[:-1], f"a.{'b' * 64}:/data"], f"{'b' * 64} is no name of Kubernetes'"),
        ([*KUBERNETES, "--namespace", "team.a"], "--namespace: team.a is no name of Kubernetes'"),
        ([*KUBERNETES[:-1], "claim:data"], "data is relative, and mounts are not: name it from /"),
        ([*KUBERNETES, "--time", "1:00:00"], "--time means nothing on kubernetes, only on slurm"),
        ([*KUBERNETES, "--partition", "big"], "--partition means nothing on kubernetes, only on slurm"),
        (["--on", "slurm", "--namespace", "ns"], "--namespace means nothing on slurm, only on kubernetes"),
        (["--on", "torchrun", "--out", "x"], "--out means nothing on torchrun, only on slurm and kubernetes"),
        (["--on", "torchrun", "--image", "x"], "--image means nothing on torchrun"),
        (["--on", "torchrun", "--shared", "/x"], "--shared means nothing on torchrun"),
        (["--on", "torchrun", "--retries", "0"], "--retries means nothing on torchrun"),
        (["--on", "torchrun", "--account", "x"], "--account means nothing on torchrun"),
        (["--on", "slurm", "--out", "x", "--dry-run"], "--dry-run writes nothing, so there is no file"),
        (
            ["--on", "slurm", "--shared", "/data"],
            "--shared /data is mounted in a container: name its --image",
        ),
        (["--on", "slurm", "--image", "a", "--shared", "data"], "--shared data is relative"),
        (["--on", "slurm", "--image", "a", "--shared", "claim:/data"], "a claim is Kubernetes'"),
        (["--on", "slurm", "--time", "tomorrow"], "--time tomorrow is no time of Slurm's: give MINUTES"),
        (
            ["--on", "slurm", "--time", "00:03:00"],
            "--grace 300 is not less than --time 00:03:00, 180 seconds",
        ),
        (["--on", "slurm", "--time", "5"], "--grace 300 is not less than --time 5, 300 seconds"),
        (["--on", "slurm", "--grace", "70000"], "Slurm takes 65535 seconds at most"),
        (["--on", "slurm", "--partition", "a\n#SBATCH --wrap=x"], "has characters other than"),
    ],
)
def test_usage(run, arguments, said):
    done = run(*arguments, code=2)
    assert said in done.stderr and not done.stdout
    assert [file.name for file in Path().iterdir()] == ["programs"]


# As `man sbatch` has it: "Acceptable time formats include "minutes", "minutes:seconds",
# "hours:minutes:seconds", "days-hours", "days-hours:minutes" and "days-hours:minutes:seconds"."
# Zero asks for no limit.
@pytest.mark.parametrize(
    ("time", "wanted"),
    [
        ("90", 5400),
        ("90:30", 5430),
        ("01:02:03", 3723),
        ("2-3", 183600),
        ("2-3:04", 183840),
        ("2-03:04:05", 183845),
        ("0", None),
        ("UNLIMITED", None),
        ("", None),
    ],
)
def test_times_of_slurm(time, wanted):
    assert seconds(time) == wanted


@pytest.mark.parametrize("time", ["1:2:3:4", "1-", "-1", "1-2-3", "1h", ":5", "5:", "1.5"])
def test_no_times_of_slurm(time):
    with pytest.raises(ValueError):
        seconds(time)


def test_a_grace_that_fits_is_taken(run):
    printed = run("--on", "slurm", "--time", "00:05:01", "--dry-run").stdout
    assert "#SBATCH --signal=B:USR1@300\n" in printed and "#SBATCH --time=00:05:01\n" in printed


def test_a_file_that_can_not_be_written_is_told(run):
    program("sbatch")
    with pytest.raises(
        EnvironmentUnfit, match="^nowhere/x.sbatch can't be written: No such file or directory"
    ):
        run("--on", "slurm", "--out", "nowhere/x.sbatch")
    assert not Path("called").exists()


def test_data_of_ones_own_is_no_stand_in(run):
    here = "plugins.python_source.directory=."
    assert "stand-in" not in run("--on", "slurm", "--dry-run", here).stderr


def test_many_nodes_have_one_line(run):
    few = run("run.world_size=8", "train.micro_batch=1", "--on", "torchrun", "--nodes", "8").stdout
    assert few.count("torch.distributed.run") == 8 and "NODE_RANK" not in few
    sizes = ["run.world_size=9", "train.micro_batch=1", "train.global_batch=9", "evaluate.sequences=9"]
    many = run(*sizes, "--on", "torchrun", "--nodes", "9").stdout
    assert many.count("torch.distributed.run") == 1 and many.endswith(" evaluate.sequences=9\n")
    assert '--node-rank="${NODE_RANK:?number of this node}" ' in many and "0 to 8." in many


def test_srun_alone_has_nothing_of_torchruns(run):
    assert (
        "torchrun" not in run("--on", "slurm", "--by", "srun", "--dry-run").stdout.replace(TINY, "").lower()
    )
    assert "TORCH_" not in run("--on", "slurm", "--by", "srun", "--dry-run").stdout


def test_a_machine_without_slurm_keeps_the_file(run):
    with pytest.raises(EnvironmentUnfit, match="tiny.sbatch is written, but there is no sbatch here"):
        run("--on", "slurm")
    assert Path("tiny.sbatch").exists()


def test_a_refusal_of_slurm_is_one_of_ours(run):
    Path("programs", "sbatch").write_text("#!/bin/bash\nexit 1\n")
    Path("programs", "sbatch").chmod(0o755)
    with pytest.raises(EnvironmentUnfit, match="sbatch tiny.sbatch ended with code 1"):
        run("--on", "slurm")
