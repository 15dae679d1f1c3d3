"""A step of dsplugins beside one of transformers' DeepseekV3ForCausalLM: same shapes, tokens and threads."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack

from dsplugins.bench.contestants import KINDS
from dsplugins.bench.turns import Timed, in_turn

WARM = 2
"""Rounds before any is timed."""


def measure(recipe: str, threads: int, rounds: int, steps: int) -> Timed:
    """Seconds a step, over `rounds` of `steps` steps each, in turn. Raises RuntimeError if one dies."""
    with ExitStack() as stack:
        ours, theirs = (_contestant(stack, kind, recipe, threads, steps) for kind in KINDS)
        in_turn(ours, theirs, WARM)
        return in_turn(ours, theirs, rounds)


def _contestant(stack: ExitStack, kind: str, recipe: str, threads: int, steps: int) -> Callable[[], float]:
    """A process of its own that takes `steps` steps whenever it is called."""
    line = [sys.executable, "-m", "dsplugins.bench.contestants", kind, recipe, str(threads)]
    process = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    stack.callback(process.wait)
    stack.callback(process.kill)
    assert process.stdin is not None and process.stdout is not None
    asked, answers = process.stdin, process.stdout

    def turn() -> float:
        asked.write(f"{steps}\n")
        asked.flush()
        for answer in answers:
            if answer.startswith("{"):  # libraries may print
                return float(json.loads(answer)["seconds"])
        raise RuntimeError(f"{kind} ended with exit code {process.wait()}")

    return turn


__all__ = ["measure"]
