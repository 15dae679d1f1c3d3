"""Data: corpora in megatron-core's `.bin`/`.idx` format, blended and split."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from dsplugins.contracts import EnvironmentUnfit, Problem, Range
from dsplugins.hookspecs import hookimpl

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dsplugins.contracts import Data, Plan, Settings
    from dsplugins.plugins.data.indexed_corpus import Corpus
    from dsplugins.plugins.data.indexed_passes import Part

OTHER_CORPORA = "read other corpora than rank 0 under the same names; copy them again"


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


class Indexed:
    """Corpora that `dsplugins data build`, or Megatron's own tools, made, through megatron-core's datasets.

    Documents are packed without a cross-sample mask, as in DeepSeek-V3 (section 4.1). Samples are pure
    functions of index, seed and corpora, whatever the length of the run: a pass over a corpus is a
    GPTDataset of its own. Corpora without a sidecar need `tokenizer`.
    """

    Options = IndexedOptions
    contract = ">=1.0,<2"
    requires: ClassVar[tuple[str, ...]] = ()
    conflicts: ClassVar[tuple[str, ...]] = ()
    env: ClassVar[Mapping[str, str]] = {}

    def __init__(self, options: IndexedOptions) -> None:
        self._options = options

    @hookimpl
    def ds_data(self, plan: Plan) -> Data:
        """The corpora. Collective.

        Raises EnvironmentUnfit where files are missing or ranks differ, ValueError where `ds_check` refuses.
        """
        from dsplugins.plugins.data.indexed_data import IndexedData
        from dsplugins.plugins.data.ranks import same_on_every_rank

        problems = list(self._shape(plan))
        if not problems:
            train, validation = self._parts()
            same_on_every_rank(_digest((*train, *validation)), OTHER_CORPORA)
            problems = [*self._agreement(train, validation), *self._sizes(plan, train, validation)]
        if problems:
            raise ValueError("; ".join(problem.message for problem in problems))
        options = self._options
        own = Path(options.cache).expanduser() if options.cache else Path(plan.run.directory) / "data_index"
        weights, held_out = _weights(options.train), _weights(options.validation)
        return IndexedData(plan, train, validation, weights, weights if options.split else held_out, own)

    @hookimpl
    def ds_check(self, plan: Plan, settings: Settings) -> Iterator[Problem]:
        """The options, the files that they name, the sidecars against both, sizes, and the vocabulary."""
        from dsplugins.plugins.data.indexed_corpus import Mismatch

        problems = list(self._shape(plan))
        yield from problems
        if problems:
            return
        try:
            train, validation = self._parts()
            sizes = list(self._sizes(plan, train, validation))
        except EnvironmentUnfit as error:
            remedy = (
                "see docs/data.md: `dsplugins data build` makes a corpus; copy it, or name another folder"
            )
            yield Problem(str(error), "plugins.indexed.train", remedy, kind="environment")
            return
        except Mismatch as error:
            remedy = "set it to the tokenizer.json that the corpus was built with, or build it again"
            yield Problem(f"plugins.indexed.tokenizer: {error}", "plugins.indexed.tokenizer", remedy)
            return
        yield from sizes
        yield from self._agreement(train, validation)
        largest = max((part.corpus for part in (*train, *validation)), key=lambda corpus: corpus.vocab_size)
        if largest.vocab_size > settings.vocab_size:
            yield Problem(
                f"model.vocab_size={settings.vocab_size} is too small: the tokenizer of {largest.prefix} has "
                f"{largest.vocab_size} ids",
                "model.vocab_size",
                f"set it to {largest.vocab_size} or more",
            )

    def _shape(self, plan: Plan) -> Iterator[Problem]:
        """What is wrong with the options alone."""
        options = self._options
        if not options.train:
            yield Problem("plugins.indexed.train names no corpus", "plugins.indexed.train", "name one")
        for key in ("train", "validation"):
            given = [item.weight for item in getattr(options, key) if isinstance(item, Weighed)]
            if given and (len(given) < len(getattr(options, key)) or min(given) <= 0):
                said = f"plugins.indexed.{key}: some corpora have a weight above 0 and others have none"
                yield Problem(said, f"plugins.indexed.{key}", "give all of them one, or none")
        if options.validation and options.split:
            said = "plugins.indexed.split and plugins.indexed.validation both say what is held out"
            yield Problem(said, "plugins.indexed.split", "drop one")
        if plan.evaluate.sequences and not options.validation and not options.split:
            said = "plugins.indexed holds nothing out, and evaluate.sequences asks for it"
            remedy = "set plugins.indexed.split or validation, or evaluate.sequences to 0"
            yield Problem(said, "plugins.indexed", remedy)
        if options.split is not None and (not 2 <= len(options.split) <= 3 or options.split[0] <= 0):
            said = (
                f"plugins.indexed.split={list(options.split)} is not two or three shares, the first above 0"
            )
            yield Problem(said, "plugins.indexed.split", "try [969, 30, 1]")

    def _parts(self) -> tuple[list[Part], list[Part]]:
        """Training and validation. Raises EnvironmentUnfit and Mismatch."""
        from dsplugins.plugins.data.indexed_corpus import Corpus
        from dsplugins.plugins.data.indexed_passes import TRAIN, VALIDATION, Part

        options = self._options
        tokenizer = Path(options.tokenizer).expanduser() if options.tokenizer else None
        split = options.split or (1.0,)
        train = [
            Part(Corpus.open(Path(prefix).expanduser(), tokenizer), split, TRAIN)
            for prefix in _prefixes(options.train)
        ]
        if options.split:
            return train, [Part(part.corpus, split, VALIDATION) for part in train]
        validation = [Corpus.open(Path(p).expanduser(), tokenizer) for p in _prefixes(options.validation)]
        return train, [Part(corpus, (0.0, 1.0), VALIDATION) for corpus in validation]

    def _agreement(self, train: Sequence[Part], validation: Sequence[Part]) -> Iterator[Problem]:
        """Of the corpora with each other and with the options."""
        first = train[0].corpus
        for corpus in {part.corpus.prefix: part.corpus for part in (*train, *validation)}.values():
            if corpus.tokenizer.sha256 != first.tokenizer.sha256:
                said = f"{corpus.prefix} and {first.prefix} were made with different tokenizers"
                remedy = "build one of them again, with the tokenizer of the other"
                yield Problem(f"plugins.indexed: {said}", "plugins.indexed.train", remedy)
        for part in train if self._options.fim_rate is not None else ():
            yield from self._fim(part.corpus)

    def _fim(self, corpus: Corpus) -> Iterator[Problem]:
        wanted, made = self._options.fim_rate, corpus.sidecar.fim_rate if corpus.sidecar else None
        if wanted != made:
            said = (
                f"was built with a rate of {made:g}" if made is not None else "has no sidecar that tells it"
            )
            remedy = f"build it again with --fim-rate {wanted:g}, or set plugins.indexed.fim_rate to "
            remedy += f"{made:g}" if made is not None else "null"
            key = "plugins.indexed.fim_rate"
            yield Problem(f"{key}={wanted:g}, but {corpus.prefix} {said}", key, remedy)

    def _sizes(self, plan: Plan, train: Sequence[Part], validation: Sequence[Part]) -> Iterator[Problem]:
        """Samples that a pass and an evaluation need."""
        from dsplugins.plugins.data.indexed_mixture import Once

        length, sequences = plan.data.seq_length, plan.evaluate.sequences
        for part in train:
            if not part.samples(length):
                yield Problem(
                    f"data.seq_length={length} does not fit into {part.tokens} training tokens of "
                    f"{part.corpus.prefix}",
                    "data.seq_length",
                    "shorten it, build a larger corpus, or change plugins.indexed.split",
                )
        if not sequences or not validation:
            return
        options = self._options
        held_out = [part.samples(length) for part in validation]
        weights = _weights(options.train if options.split else options.validation)
        # An evaluation may ask for more than there is and gets all, but every rank needs a micro-batch.
        samples = len(Once(weights or held_out, held_out)) if all(held_out) else 0
        together = plan.train.micro_batch * plan.layout.data
        if min(samples, sequences) < together:
            key = "split" if options.split else "validation"
            yield Problem(
                f"evaluate.sequences={sequences}, {samples} validation samples of {length} tokens from "
                f"plugins.indexed.{key}: fewer than the {together} that all ranks take at once",
                f"plugins.indexed.{key}" if sequences >= together else "evaluate.sequences",
                "hold out more, shorten data.seq_length, or turn evaluation off: evaluate.sequences: 0",
            )


def _prefixes(items: Sequence[str | Weighed]) -> list[str]:
    return [item if isinstance(item, str) else item.prefix for item in items]


def _weights(items: Sequence[str | Weighed]) -> list[float] | None:
    weights = [item.weight for item in items if isinstance(item, Weighed)]
    return weights or None


def _digest(parts: Sequence[Part]) -> str:
    return hashlib.sha256("".join(part.corpus.digest for part in parts).encode()).hexdigest()
