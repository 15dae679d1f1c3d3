"""The command, as a user runs it: two processes, a run directory, a second call."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import forks
import pytest
from click.testing import CliRunner

from dsplugins.cli import report

TINY = Path(__file__).parent / "tiny.yaml"
PLUGINS = ["plugins.expert_load={}", "plugins.curves={}", "plugins.bf16={}", "plugins.fp32=null"]
FIELDS = {
    *("step", "time", "tokens", "loss", "mtp_loss", "aux_loss", "grad_norm", "learning_rate"),
    *("bias_update_rate", "mtp_weight", "global_batch", "max_vio", "tokens_per_second"),
    *("step_seconds", "skipped"),
}


def command(folder, *overrides):
    line = [sys.executable, "-m", "dsplugins", "train", str(TINY), "run.world_size=2", *overrides]
    return forks.run(line, cwd=folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    done = command(folder, "parallel.expert=2", "run.directory=out", *PLUGINS)
    assert done.returncode == 0, done.stderr
    return folder, done


def test_every_step_is_in_the_metrics(run):
    folder, _ = run
    rows = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert all(set(row) >= FIELDS for row in rows)
    assert rows[-1]["tokens"] == 5 * 8 * 32 and rows[-1]["loss"] < rows[0]["loss"]


def test_what_is_worth_seeing_is_shown(run):
    _, done = run
    shown = [
        "router",
        "aux_free",
        "expert 2",
        "parameters",
        "step 5",
        "max_vio",
        "bigram",
        "acceptance",
        "writes",
    ]
    for word in shown:
        assert word in done.stdout, word
    assert "finalize_model_grads -> router counts and bias update" in done.stdout


def test_the_directory_tells_the_run(run):
    folder, _ = run
    out = folder / "out"
    assert json.loads((out / "status.json").read_text())["code"] == 0
    lock = json.loads((out / "plugins.lock.json").read_text())
    assert {row["name"] for row in lock["plugins"]} >= {"aux_free", "mla"} and "torch" in lock["versions"]
    assert "parallel.expert=2" in (out / "recipe.yaml").read_text()
    assert all(file.read_bytes()[:4] == b"\x89PNG" for file in (out / "plots").iterdir())
    assert len(list((out / "plots").iterdir())) >= 4


def test_a_second_call_says_complete(run):
    folder, _ = run
    before = (folder / "out" / "metrics.jsonl").read_text()
    done = command(folder, "parallel.expert=2", "run.directory=out", *PLUGINS)
    assert done.returncode == 0 and "complete" in done.stdout
    assert (folder / "out" / "metrics.jsonl").read_text() == before


def test_the_report_of_a_run(run, monkeypatch):
    """What a run wrote is what its page reads."""
    folder, _ = run
    monkeypatch.chdir(folder)
    done = CliRunner().invoke(report.command, ["out"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    page = (folder / "out" / "report.html").read_text()
    last = json.loads((folder / "out" / "metrics.jsonl").read_text().splitlines()[-1])
    for shown in ("<td>complete</td>", "<td>5</td>", f"<td>{last['loss']:.5g}</td>", "<td>aux_free</td>"):
        assert shown in page, shown
    for title in ("Losses", "Schedules", "Expert load over time", "Validation", "A held-out line"):
        assert f"<h2>{title}</h2>" in page, title
    assert page.count("data:image/png;base64,") == 6


@pytest.mark.parametrize("name", ["plugins.lock.json", "recipe.resolved.yaml"])
def test_a_damaged_run_directory_is_one_message(run, tmp_path, name):
    folder, _ = run
    shutil.copytree(folder / "out", tmp_path / "out")
    (tmp_path / "out" / name).write_text("")
    done = command(tmp_path, "parallel.expert=2", "run.directory=out", *PLUGINS)
    assert done.returncode == 4
    assert done.stderr.startswith(f"out/{name}: is empty: put back a copy of it; ")
    assert done.stderr.count("\n") == 1


def test_half_a_line_is_no_step(run, tmp_path):
    folder, _ = run
    shutil.copytree(folder / "out", tmp_path / "out")
    with (tmp_path / "out" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    done = command(tmp_path, "parallel.expert=2", "run.directory=out", *PLUGINS)
    assert done.returncode == 0 and "complete (5 steps)" in done.stdout


def test_what_megatron_refuses_ends_with_code_3(tmp_path):
    done = command(tmp_path, "run.directory=out", "model.hidden_sice=3")
    assert done.returncode == 3
    assert "command line: model.hidden_sice" in done.stderr and "did you mean hidden_size" in done.stderr
    assert not (tmp_path / "out" / "metrics.jsonl").exists()
