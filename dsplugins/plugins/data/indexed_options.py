"""Options of the plugin `indexed`, and what is wrong with them before any file is looked at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from dsplugins.contracts import Problem, Range

if TYPE_CHECKING:
    from dsplugins.contracts import Plan


MISSING = "`dsplugins data build` makes a corpus (docs/data.md); copy it here, or name another one"
"""What to do about a corpus that isn't there."""


@dataclass(frozen=True)
class Weighed:
    """A corpus and its share."""

    prefix: str
    """Its files without their endings."""
    weight: Annotated[float, Range(0.0)]
    """Share of samples, over the sum of all weights."""


@dataclass(frozen=True)
class IndexedOptions:
    """Options of Indexed."""

    train: tuple[str | Weighed, ...]
    """Corpora, as PREFIX or {prefix: PREFIX, weight: SHARE}; without weights each counts by its size."""
    validation: tuple[str | Weighed, ...] = ()
    """Corpora that are held out as a whole."""
    split: tuple[Annotated[float, Range(0.0)], ...] | None = None
    """Instead of `validation`: shares of each corpus' documents for training, validation and neither, as
    [969, 30, 1]; the first documents train."""
    fim_rate: Annotated[float, Range(0.0, 1.0)] | None = None
    """What the training corpora were built with; null takes any."""
    tokenizer: str | None = None
    """Path of the tokenizer.json; null takes the one that the corpora's sidecars name."""
    cache: str | None = None
    """Folder for megatron-core's index of each pass, shared by all machines; null: in the run directory."""

    @property
    def weights(self) -> list[float] | None:
        """Of the training corpora."""
        return _weights(self.train)

    @property
    def validation_weights(self) -> list[float] | None:
        """Of what is held out: with `split` the training corpora's."""
        return _weights(self.train if self.split else self.validation)

    def prefixes(self, key: str) -> list[str]:
        """Of `train` or `validation`."""
        items: tuple[str | Weighed, ...] = getattr(self, key)
        return [item if isinstance(item, str) else item.prefix for item in items]

    def problems(self, plan: Plan) -> Iterator[Problem]:
        """What contradicts itself, or asks for an evaluation on nothing."""
        if not self.train:
            yield Problem("plugins.indexed.train names no corpus", "plugins.indexed.train", "name one")
        for key in ("train", "validation"):
            given = _weights(getattr(self, key))
            if given and (len(given) < len(getattr(self, key)) or min(given) <= 0):
                said = f"plugins.indexed.{key}: some corpora have a weight above 0 and others have none"
                yield Problem(said, f"plugins.indexed.{key}", "give all of them one, or none")
        if self.validation and self.split:
            said = "plugins.indexed.split and plugins.indexed.validation both say what is held out"
            yield Problem(said, "plugins.indexed.split", "drop one")
        if plan.evaluate.sequences and not self.validation and not self.split:
            said = "plugins.indexed holds nothing out, and evaluate.sequences asks for it"
            remedy = "set plugins.indexed.split or validation, or evaluate.sequences to 0"
            yield Problem(said, "plugins.indexed", remedy)
        if self.split is not None and (not 2 <= len(self.split) <= 3 or self.split[0] <= 0):
            said = f"plugins.indexed.split={list(self.split)} is not two or three shares, the first above 0"
            yield Problem(said, "plugins.indexed.split", "try [969, 30, 1]")


def _weights(items: Sequence[str | Weighed]) -> list[float] | None:
    return [item.weight for item in items if isinstance(item, Weighed)] or None


__all__ = ["MISSING", "IndexedOptions", "Weighed"]
