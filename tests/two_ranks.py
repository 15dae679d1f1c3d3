"""A run of two ranks that is stopped and started again by the same command: for the tests of resuming."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import forks

TINY = Path(__file__).parent / "tiny.yaml"
SETUP = ["run.world_size=2", "parallel.expert=2", "train.micro_batch=2", "train.steps=12"]
SETUP += ["evaluate.sequences=0", "save.every=3"]
BF16 = ["plugins.fp32=null", "plugins.bf16={}", "plugins.adamw.moments=bf16"]
LOADS = ["plugins.expert_load.plots=false"]
NUMBERS = (
    *("step", "tokens", "loss", "mtp_loss", "aux_loss", "grad_norm", "max_vio", "learning_rate"),
    "expert_load",  # in multiples of the mean, which is 64 tokens here: three digits are the counts
)


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(name, *more):
    train = [sys.executable, "-m", "dsplugins", "train", str(TINY)]
    return [*train, *SETUP, *BF16, *LOADS, f"run.directory={name}", *more]


def start(folder, name, *more):
    return forks.Fork(command(name, *more), folder, ENVIRONMENT)


def finish(process):
    said, _ = process.communicate(timeout=180)
    return process.returncode, said


def rows(folder, name):
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    return [{key: row[key] for key in NUMBERS} for row in map(json.loads, lines)]


def ranks_of(process):
    """Process ids of the launcher's ranks."""
    listed = subprocess.run(["ps", "--ppid", str(process.pid), "-o", "pid="], capture_output=True, text=True)
    return [int(word) for word in listed.stdout.split()]
