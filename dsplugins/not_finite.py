"""A loss or gradient that is not finite: noticed on all ranks together, with what helps to find out why."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dsplugins import optimizer_groups

if TYPE_CHECKING:
    from dsplugins.assemble import Assembly
    from dsplugins.contracts import Step


MOST = 3
"""Dumps of a run that skips such steps: they may be many."""


class NotFinite(RuntimeError):
    """The run stopped because of it. What was saved before is good."""


def is_finite(step: Step) -> bool:
    """Whether a step's loss and gradient norm are; the same answer on every rank."""
    numbers = (step.loss, step.mtp_loss, step.grad_norm)
    return all(number is None or math.isfinite(number) for number in numbers)


def enough(folder: Path) -> bool:
    """Whether other steps have left MOST dumps beside `folder`; the same on all ranks."""
    return sum(other != folder for other in folder.parent.glob("step-*")) >= MOST


def dump(run: Assembly, step: Step, sequences: int, folder: Path) -> str:
    """Write `folder/rank-R.json`; where it is, or why there is none: a full disk must not hide the cause.

    It holds the step, its samples, and names of this rank's parameters that are not finite or have such
    gradients. `sequences` have been trained on, those of the step included.
    """
    facts = _facts(run, step, sequences)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"rank-{run.rank}.json").write_text(json.dumps(facts, indent=1) + "\n")
    except OSError as error:
        return f"no dump in {folder}: {error.strerror or type(error).__name__}"
    return f"see {folder}"


def _facts(run: Assembly, step: Step, sequences: int) -> dict[str, Any]:
    return {
        "step": step.step,
        "loss": str(step.loss),
        "mtp_loss": str(step.mtp_loss),
        "grad_norm": str(step.grad_norm),
        "learning_rate": step.learning_rate,
        "scheduled": dict(step.scheduled),
        "training_samples": [sequences - step.global_batch, sequences],
        "gradients_not_finite": _bad_gradients(run.chunks),
        "weights_not_finite": _bad_weights(run.chunks),
    }


def _bad_gradients(chunks: Sequence[torch.nn.Module]) -> list[str]:
    """Names of parameters whose gradient, as this rank holds it, is not finite."""
    names = optimizer_groups.parameter_names(chunks)
    grads = ((name, getattr(parameter, "main_grad", None)) for parameter, name in names.items())
    return [name for name, grad in grads if grad is not None and not bool(grad.isfinite().all())]


def _bad_weights(chunks: Sequence[torch.nn.Module]) -> list[str]:
    names = optimizer_groups.parameter_names(chunks)
    return [name for parameter, name in names.items() if not bool(parameter.isfinite().all())]


__all__ = ["NotFinite", "dump", "enough", "is_finite"]
