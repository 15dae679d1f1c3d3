"""Corpora against a recipe: what is not here, what was made otherwise, what is too small."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dsplugins.contracts import EnvironmentUnfit, Problem
from dsplugins.plugins.data.indexed_corpus import Corpus, Mismatch
from dsplugins.plugins.data.indexed_mixture import Mixture
from dsplugins.plugins.data.indexed_options import MISSING, IndexedOptions
from dsplugins.plugins.data.indexed_passes import TRAIN, VALIDATION, Part

if TYPE_CHECKING:
    from dsplugins.contracts import Plan

OTHER_TOKENIZER = "set it to the tokenizer.json that the corpus was built with, or build it again"


def opened(options: IndexedOptions) -> tuple[dict[str, Corpus], list[Problem]]:
    """Prefix -> corpus, of those that can be read, and what is wrong with the others."""
    tokenizer = Path(options.tokenizer).expanduser() if options.tokenizer else None
    corpora: dict[str, Corpus] = {}
    problems = []
    for key in ("train", "validation"):
        for prefix in options.prefixes(key):
            try:
                corpora[prefix] = Corpus.open(Path(prefix).expanduser(), tokenizer)
            except EnvironmentUnfit as error:
                problems.append(Problem(str(error), f"plugins.indexed.{key}", MISSING, kind="environment"))
            except Mismatch as error:
                said = f"plugins.indexed.tokenizer: {error}"
                problems.append(Problem(said, "plugins.indexed.tokenizer", OTHER_TOKENIZER))
    return corpora, problems


def parts(options: IndexedOptions, corpora: Mapping[str, Corpus]) -> tuple[list[Part], list[Part]]:
    """Training and validation."""
    split, held_out = options.split or (1.0,), options.split or (0.0, 1.0)
    validation = options.prefixes("train" if options.split else "validation")
    return (
        [Part(corpora[prefix], split, TRAIN) for prefix in options.prefixes("train")],
        [Part(corpora[prefix], held_out, VALIDATION) for prefix in validation],
    )


def disagreements(options: IndexedOptions, corpora: Mapping[str, Corpus]) -> Iterator[Problem]:
    """Of the corpora with each other and with the options."""
    first = next(iter(corpora.values()), None)
    for corpus in corpora.values():
        if first and corpus.tokenizer.sha256 != first.tokenizer.sha256:
            said = f"{corpus.prefix} and {first.prefix} were made with different tokenizers"
            remedy = "build one of them again, with the tokenizer of the other"
            yield Problem(f"plugins.indexed: {said}", "plugins.indexed.train", remedy)
    for prefix in options.prefixes("train"):
        if prefix in corpora and options.fim_rate is not None:
            yield from _fim(options.fim_rate, corpora[prefix])


def _fim(wanted: float, corpus: Corpus) -> Iterator[Problem]:
    made = corpus.sidecar.fim_rate if corpus.sidecar else None
    if wanted != made:
        said = f"was built with a rate of {made:g}" if made is not None else "has no sidecar that tells it"
        instead = f"{made:g}" if made is not None else "null"
        remedy = f"build it again with --fim-rate {wanted:g}, or set plugins.indexed.fim_rate to {instead}"
        key = "plugins.indexed.fim_rate"
        yield Problem(f"{key}={wanted:g}, but {corpus.prefix} {said}", key, remedy)


def sizes(
    options: IndexedOptions, plan: Plan, train: Sequence[Part], validation: Sequence[Part]
) -> Iterator[Problem]:
    """Samples that a pass and an evaluation need."""
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
    held_out = [part.samples(length) for part in validation]
    samples = Mixture(options.validation_weights or held_out).until(held_out) if all(held_out) else 0
    # An evaluation may ask for more than there is and gets all, but every rank needs a micro-batch.
    together = plan.train.micro_batch * plan.layout.data
    if min(samples, sequences) < together:
        key = "plugins.indexed.split" if options.split else "plugins.indexed.validation"
        yield Problem(
            f"evaluate.sequences={sequences}, {samples} validation samples of {length} tokens from {key}: "
            f"fewer than the {together} that all ranks take at once",
            key if sequences >= together else "evaluate.sequences",
            "hold out more, shorten data.seq_length, or turn evaluation off: evaluate.sequences: 0",
        )


__all__ = ["disagreements", "opened", "parts", "sizes"]
