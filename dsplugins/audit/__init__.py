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

from collections.abc import Sequence

from dsplugins.audit import fields, layers, loop, overlap, softmax, stages, te_fp8, tensors
from dsplugins.audit.built import Built, Standing
from dsplugins.audit.ignored import ignored
from dsplugins.audit.table import Kind, describe, describe_run, span


class AuditFailure(RuntimeError):
    """The built model is not the chosen one; lists every difference."""

    def __init__(self, differences: Sequence[str]) -> None:
        self.differences = tuple(differences)
        super().__init__("what was built is not what was chosen: " + "; ".join(differences))


def audit(run: Built) -> None:
    """Raise AuditFailure with every difference found on this rank; collective over all ranks."""
    found = [
        *fields.differences(run),
        *gathered(of_stage(run)),
        *stages.differences(run),
        *tensors.differences(run),
        *loop.differences(run),
        *overlap.differences(run),
    ]
    if found:
        raise AuditFailure(found)


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
    "Standing",
    "audit",
    "describe",
    "describe_run",
    "gathered",
    "ignored",
    "of_stage",
]
