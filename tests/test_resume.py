"""A run that was stopped goes on as if it had not been: the same numbers, no step twice."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import forks
import pytest
import small_disk
from click.testing import CliRunner
from two_ranks import ENVIRONMENT, command, finish, ranks_of, rows, start

from dsplugins.cli import evaluate


def status(folder, name):
    return json.loads((folder / name / "status.json").read_text())


def wait_for_step(folder, name, step, process):
    file = folder / name / "metrics.jsonl"
    while not (file.exists() and len(file.read_text().splitlines()) >= step):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def wait_for_checkpoint(folder, name, process):
    while not list((folder / name / "checkpoints").glob("step-*[0-9]")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody interrupts, and its rows."""
    folder = tmp_path_factory.mktemp("runs")
    code, said = finish(start(folder, "whole"))
    assert code == 0, said
    return folder, rows(folder, "whole")


def test_checkpoints_are_there_and_the_old_ones_gone(whole):
    folder, _ = whole
    found = sorted(entry.name for entry in (folder / "whole" / "checkpoints").iterdir())
    assert found == ["step-00000009", "step-00000012"]


@pytest.mark.parametrize("asked", [signal.SIGTERM, signal.SIGUSR1], ids=lambda asked: asked.name)
def test_a_signal_saves_and_the_same_command_goes_on_bit_for_bit(whole, asked):
    (folder, expected), name = whole, f"asked_{asked.name}"
    process = start(folder, name)
    wait_for_step(folder, name, 4, process)
    process.send_signal(asked)
    code, said = finish(process)
    assert code == 75, said
    stopped = status(folder, name)
    assert stopped["code"] == 75 and asked.name in stopped["reason"]
    assert "checkpoints/step-" in stopped["reason"]
    done = len(rows(folder, name))
    assert done < len(expected), "it was stopped too late to show anything"
    code, said = finish(start(folder, name))
    assert code == 0 and f"resumed from {name}/checkpoints/step-{done:08d}" in said, said
    assert rows(folder, name) == expected
    assert status(folder, name)["code"] == 0


@pytest.mark.parametrize("rank", [0, -1], ids=["the first", "the last"])
def test_a_killed_rank_costs_the_steps_since_the_last_checkpoint_only(whole, rank):
    (folder, expected), name = whole, f"killed_{rank}"
    process = start(folder, name)
    wait_for_step(folder, name, 5, process)
    wait_for_checkpoint(folder, name, process)
    os.kill(ranks_of(process)[rank], signal.SIGKILL)
    code, said = finish(process)
    assert code == 128 + signal.SIGKILL or code == 1, said
    assert "SIGKILL" in status(folder, name)["reason"]
    # A line that was being written when the machine went down.
    with (folder / name / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "loss"')
    code, said = finish(start(folder, name))
    assert code == 0 and f"resumed from {name}/checkpoints/step-" in said, said
    assert rows(folder, name) == expected


def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(whole):
    folder, expected = whole
    newest = folder / "whole" / "checkpoints" / "step-00000012"
    data = sorted(newest.glob("__*"))[0]
    data.write_bytes(data.read_bytes()[:-1])
    (folder / "whole" / "run.json").unlink()
    code, said = finish(start(folder, "whole"))
    assert code == 0, said
    assert f"{newest.relative_to(folder)} is damaged" in said
    assert "resumed from whole/checkpoints/step-00000009" in said
    assert rows(folder, "whole") == expected


def test_fresh_starts_over(whole):
    folder, expected = whole
    code, said = finish(start(folder, "whole", "--fresh"))
    assert code == 0 and "resumed" not in said, said
    assert rows(folder, "whole") == expected


def test_a_changed_recipe_is_refused_with_the_difference_or_accepted_and_noted(whole):
    folder, expected = whole
    code, said = finish(start(folder, "whole", "train.steps=13", "optimizer.clip_grad=0.5"))
    assert code == 3, said
    assert "another train.steps: 12 -> 13" in said and "another optimizer.clip_grad: 1.0 -> 0.5" in said
    assert said.count("--accept-changes") == 2 and rows(folder, "whole") == expected
    changed = ["train.steps=13", "optimizer.clip_grad=0.5", "--accept-changes"]
    code, said = finish(start(folder, "whole", *changed))
    assert code == 0 and "accepted: train.steps: 12 -> 13" in said, said
    assert rows(folder, "whole")[:12] == expected and len(rows(folder, "whole")) == 13
    (noted,) = map(json.loads, (folder / "whole" / "changes.jsonl").read_text().splitlines())
    assert noted["after_step"] == 12 and "optimizer.clip_grad: 1.0 -> 0.5" in noted["changes"]


def test_a_changed_recipe_is_refused_where_the_log_is_gone(whole):
    """Its checkpoints tell that there is a run."""
    folder, _ = whole
    shutil.copytree(folder / "whole", folder / "unlogged")
    (folder / "unlogged" / "metrics.jsonl").unlink()
    code, said = finish(start(folder, "unlogged", "optimizer.clip_grad=0.25"))
    assert code == 3 and "-> 0.25" in said, said


def test_what_a_smaller_model_leaves_behind_is_told(whole):
    folder, _ = whole
    shutil.copytree(folder / "whole", folder / "smaller")
    fewer = ["train.steps=14", "model.num_layers=3", "--accept-changes"]
    code, said = finish(start(folder, "smaller", *fewer))
    assert code == 0 and "accepted: model.num_layers: 4 -> 3" in said, said
    assert "left out, since this model has no such thing: weights/decoder.layers.3." in said


def test_diff_tells_two_runs_apart(whole):
    folder, _ = whole
    line = [sys.executable, "-m", "dsplugins", "diff", "whole", "asked_SIGTERM"]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    *now, noted = sorted(done.stdout.splitlines(), key=lambda line: line.startswith("changed"))
    assert set(now) == {"train.steps: 13 -> 12", "optimizer.clip_grad: 0.5 -> 1.0"}
    key, _, changes = noted.removesuffix(" -> absent").partition(": ")
    assert key == "changed after step 12" and noted.endswith(" -> absent")
    assert set(changes.split("; ")) == {"train.steps: 12 -> 13", "optimizer.clip_grad: 1.0 -> 0.5"}


def test_a_step_without_a_checkpoint_is_refused_before_a_process_is_started(whole, monkeypatch):
    folder, _ = whole
    monkeypatch.chdir(folder)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr("dsplugins.cli.start.started", None)
    done = CliRunner().invoke(evaluate.command, ["whole", "--step", "7"])
    there = ", ".join(str(int(path.name[5:])) for path in sorted(Path("whole/checkpoints").glob("step-*")))
    assert done.exit_code == 2 and there
    assert f"whole holds no checkpoint of step 7: there are those of {there}" in done.stderr
    shutil.copytree("whole", "bare", ignore=shutil.ignore_patterns("checkpoints"))
    done = CliRunner().invoke(evaluate.command, ["bare"])
    assert done.exit_code == 2 and "bare holds no checkpoint to evaluate" in done.stderr


def test_a_rank_that_hangs_ends_the_run_in_a_bounded_time(tmp_path):
    began = time.monotonic()
    process = start(tmp_path, "hung", "run.timeout_minutes=0.15")
    wait_for_step(tmp_path, "hung", 2, process)
    os.kill(ranks_of(process)[-1], signal.SIGSTOP)
    code, said = finish(process)
    assert code not in (0, 75), said
    assert time.monotonic() - began < 90
    told = status(tmp_path, "hung")
    assert told["code"] == code
    expected = "rank 0: no answer from other ranks within run.timeout_minutes=0.15: a rank hangs or is gone ("
    assert told["reason"].startswith(expected) and told["reason"].count("Timed out") == 1
    assert told["reason"] in said


FULL = """
import os, pathlib, shutil, subprocess, sys
import small_disk

size, *command = sys.argv[1:]
small_disk.alone()
kept = pathlib.Path("small/checkpoints")
kept.mkdir(parents=True)
small_disk.mount(kept, size)
first = subprocess.run(command).returncode
shutil.copy("small/status.json", "first.json")
pathlib.Path("after_first").write_text(" ".join(sorted(os.listdir(kept))))
small_disk.mount(kept, "100m", again=True)
second = subprocess.run(command).returncode
pathlib.Path("after_second").write_text(" ".join(sorted(os.listdir(kept))))
print("codes", first, second)
"""


@small_disk.needed
def test_a_full_disk_is_one_line_and_what_was_saved_stays(whole):
    folder, expected = whole
    one = sum(f.stat().st_size for f in next((folder / "whole" / "checkpoints").iterdir()).iterdir())
    (folder / "full.py").write_text(FULL)
    line = [sys.executable, "full.py", str(int(1.6 * one)), *command("small", "save.keep=1")]
    code, said = finish(forks.Fork(line, folder, {**ENVIRONMENT, **small_disk.ENVIRONMENT}))
    assert code == 0 and "codes 4 0" in said, said
    told = json.loads((folder / "first.json").read_text())
    # Step 6 failed in the background, which is seen when step 9 is to be saved: that is tried at once.
    assert told["code"] == 4 and "step-00000009 can't be written: " in told["reason"]
    assert "No space left on device" in told["reason"]
    assert "the same command goes on from small/checkpoints/step-00000003" in told["reason"]
    assert "Traceback" not in said and said.count("No space left") == 1
    assert "step-00000003" in (folder / "after_first").read_text().split()
    assert "resumed from small/checkpoints/step-00000003" in said
    assert (folder / "after_second").read_text().split() == ["step-00000012"]
    assert rows(folder, "small") == expected
