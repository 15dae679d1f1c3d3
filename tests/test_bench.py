"""The benchmarks run and write records; what they measure is no test's business."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import forks

from dsplugins.bench.turns import in_turn

TINY = Path(__file__).parent / "tiny.yaml"


def test_turns_alternate_and_the_ratio_is_that_of_medians():
    order = []

    def contestant(name, seconds):
        return lambda: order.append(name) or seconds

    timed = in_turn(contestant("a", 3.0), contestant("b", 2.0), 4)
    assert order == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert timed.ratio == 1.5 and timed.results(("a", "b"))["median_of_paired_ratios"] == 1.5


def test_the_loop_is_measured_on_the_recipes_ranks(tmp_path):
    line = ["bench", "loop", str(TINY), "run.world_size=2", "parallel.expert=2", "--rounds", "2"]
    done = forks.run([sys.executable, "-m", "dsplugins", *line, "--out", "records"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "records" / "bench_loop.json").read_text())["results"]
    assert results["rounds"] == 2 == len(results["hand_written_seconds"])
    assert "ratio of medians" in done.stdout


def test_both_contestants_learn_from_the_same_tokens(tmp_path):
    losses = {}
    for kind in ("dsplugins", "huggingface"):
        line = [sys.executable, "-m", "dsplugins.bench.contestants", kind, "bench/small.yaml", "1"]
        done = forks.run(line, input="1\n1\n")
        assert done.returncode == 0, done.stderr
        answers = [json.loads(text) for text in done.stdout.splitlines() if text.startswith("{")]
        losses[kind] = [answer["loss"] for answer in answers]
    # Two random initialisations, the same text: close to the entropy of a uniform guess over 512.
    assert all(abs(loss - 6.24) < 0.4 for found in losses.values() for loss in found), losses
