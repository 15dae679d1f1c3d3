"""What was built against what was chosen; a difference stops the run before the first step.

megatron-core ignores or replaces several wishes without a word (a fused projection put in place of a
plugin's, an MTP block of stock parts, `fp8` without transformer-engine, a softmax scale). The audit looks
at the built modules and compares them with the slots' answers, asked once more, and with the recipe.

`wanted` what each layer should be made of; `layers` and `softmax` what stands there; `te_fp8` what
TransformerEngine multiplies in FP8; `stages` which layers stand where; `fields` and `ignored` megatron-core's
configuration; `tensors` number formats, routers' buffers, optimizer; `loop` what the loop will call;
`overlap` what travels behind computations; `table` what was built, for people and for the run's directory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from dsplugins.audit import fields, layers, loop, overlap, softmax, stages, te_fp8, tensors
from dsplugins.audit.built import Built, Placed, Standing
from dsplugins.audit.ignored import ignored
from dsplugins.audit.table import Kind, describe, describe_run, span
from dsplugins.contracts import Problem, RecipeError


class AuditFailure(RecipeError):
    """The built model is not the chosen one; lists every difference."""

    def __init__(self, differences: Sequence[str]) -> None:
        self.differences = tuple(differences)
        super().__init__([*map(problem, differences)])


def problem(said: str) -> Problem:
    """A difference as `check` and a run tell it."""
    return Problem(f"what is built is not what was chosen: {said}", "model", "see what it names")


def audit(run: Built) -> None:
    """Raise AuditFailure on every rank with what was found on any; collective over all ranks."""
    _agree(
        run,
        [
            *stages.differences(run),
            *tensors.differences(run),
            *loop.differences(run),
            *overlap.differences(run),
        ],
    )


def audit_forward(run: Placed) -> None:
    """The same where nothing is trained: without the optimizer, the loop and what overlaps."""
    _agree(run, [*stages.differences(run), *tensors.of_model(run)])


def _agree(run: Standing, others: list[str]) -> None:
    mine = ([*fields.differences(run)], [*of_stage(run)], others)
    configured, built, others = (_of_all(found) for found in zip(*_everywhere(mine), strict=True))
    if configured or built or others:
        raise AuditFailure([*configured, *gathered(built), *others])


def _everywhere(mine: Any) -> list[Any]:
    """What each rank has, by rank."""
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, mine)
    return everyone


def _of_all(found: Iterable[Iterable[Any]]) -> list[Any]:
    """Each difference once: ranks that hold the same see the same."""
    return list(dict.fromkeys(difference for of_a_rank in found for difference in of_a_rank))


def of_stage(stage: Standing) -> layers.Differences:
    """What can be found of one rank without memory, its optimizer or other ranks: (place, what is said)."""
    return [*layers.differences(stage), *softmax.differences(stage), *te_fp8.differences(stage)]


def gathered(differences: layers.Differences) -> list[str]:
    """One line for what is said of many layers: `decoder.1-60: router is ...`."""
    places: dict[str, list[str]] = {}
    for place, said in differences:
        places.setdefault(said, []).append(place)
    return [f"{span(names)}: {said}" for said, names in places.items()]


__all__ = [
    "AuditFailure",
    "Built",
    "Kind",
    "Placed",
    "Standing",
    "audit",
    "audit_forward",
    "describe",
    "describe_run",
    "gathered",
    "ignored",
    "of_stage",
    "problem",
]
