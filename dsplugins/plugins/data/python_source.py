"""Data: the sources of the Python standard library, byte by byte. Needs no download."""

from __future__ import annotations

import functools
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from dsplugins.contracts import EnvironmentUnfit, Problem, Range
from dsplugins.hookspecs import hookimpl

if TYPE_CHECKING:
    from dsplugins.contracts import Data, Plan, Settings
    from dsplugins.plugins.data.files import Split

OTHER_SOURCES = (
    "read other Python sources than rank 0; install one Python version everywhere "
    "or point plugins.python_source.directory to a shared folder"
)


@dataclass(frozen=True)
class PythonSourceOptions:
    """Options of PythonSource."""

    validation: Annotated[float, Range(0.0, 0.5)] = 0.05
    """Share of the files that is held out; a file's name alone decides its side."""
    fim_rate: Annotated[float, Range(0.0, 1.0)] = 0.1
    """Share of the training documents in fill-in-middle form (DeepSeek-V3, section 4.1: 0.1)."""
    max_bytes: int | None = None
    """Use at most so many bytes of source, both splits together; null for all."""
    tests: bool = False
    """Read the library's own tests, too: nearly three times as much text, where they are installed."""
    directory: str | None = None
    """Read the `*.py` files below this folder instead of the standard library."""


class PythonSource:
    """Real text that every machine with Python has: the sources of its standard library.

    Tokens are bytes and four marks. Fill-in-middle and packing without a cross-sample mask follow
    DeepSeek-V3 (section 4.1). Samples are pure functions of index, seed and files; ranks that read
    different files are an error. Different Python versions hold different files: compare losses
    only between runs with the same `digest`.
    """

    Options = PythonSourceOptions
    contract = ">=1.0,<2"
    requires: ClassVar[tuple[str, ...]] = ()
    conflicts: ClassVar[tuple[str, ...]] = ()
    env: ClassVar[Mapping[str, str]] = {}

    def __init__(self, options: PythonSourceOptions) -> None:
        self._options = options

    @property
    def told(self) -> str:
        """Nobody wants to train on it by mistake."""
        return "" if self._options.directory else "Python's standard library"

    @hookimpl
    def ds_data(self, plan: Plan) -> Data:
        """The corpus. Raises EnvironmentUnfit where there are no sources or ranks differ, ValueError where
        a split is too small."""
        from dsplugins.plugins.data.corpus import Corpus
        from dsplugins.plugins.data.ranks import same_on_every_rank

        split = self._split
        same_on_every_rank(split.digest, OTHER_SOURCES)
        problems = list(_size_problems(plan, split))
        if problems:
            raise ValueError("; ".join(problem.message for problem in problems))
        return Corpus(
            split,
            seq_length=plan.data.seq_length,
            seed=plan.train.seed,
            fim_rate=self._options.fim_rate,
            evaluated=plan.evaluate.sequences,
            together=plan.train.micro_batch * plan.layout.data,
            source=self._options.directory or f"standard library of Python {platform.python_version()}",
        )

    @hookimpl
    def ds_check(self, plan: Plan, settings: Settings) -> Iterator[Problem]:
        """Sizes against the files that are here, and the vocabulary."""
        from dsplugins.plugins.data.tokens import VOCAB_SIZE

        if settings.vocab_size < VOCAB_SIZE:
            yield Problem(
                f"model.vocab_size={settings.vocab_size} is too small: python_source has {VOCAB_SIZE} tokens",
                key="model.vocab_size",
                remedy=f"set model.vocab_size to {VOCAB_SIZE} or more (320 divides by 64)",
            )
        lacking = list(self.ds_here())
        yield from lacking
        if not lacking:
            yield from _size_problems(plan, self._split)

    @hookimpl
    def ds_here(self) -> Iterator[Problem]:
        """Whether there are sources."""
        try:
            _ = self._split
        except EnvironmentUnfit as error:
            yield Problem(
                str(error),
                key="plugins.python_source.directory",
                remedy="point plugins.python_source.directory to a folder with *.py files",
                kind="environment",
            )

    @functools.cached_property
    def _split(self) -> Split:
        """Read once in a process: checks and the run look at the same."""
        from dsplugins.plugins.data.files import library_documents, read_documents, split_documents

        options = self._options
        limits: Any = {"tests": options.tests, "max_bytes": options.max_bytes}
        if options.directory is None:
            documents = library_documents(**limits)
        else:
            documents = read_documents(Path(options.directory).expanduser(), **limits)
        return split_documents(documents, options.validation)


def _size_problems(plan: Plan, split: Split) -> Iterator[Problem]:
    seq_length, sequences = plan.data.seq_length, plan.evaluate.sequences
    if seq_length < 1:
        yield Problem(
            f"data.seq_length={seq_length} is not a length", key="data.seq_length", remedy="try 256"
        )
        return
    train = sum(len(document.content) + 1 for document in split.train)
    if train <= seq_length:
        yield Problem(
            f"data.seq_length={seq_length} does not fit into {train} tokens of training text",
            key="data.seq_length",
            remedy="shorten it, or raise plugins.python_source.max_bytes",
        )
    held_out = sum(len(document.content) + 1 for document in split.validation)
    samples = max(0, (held_out - 1) // seq_length)
    # An evaluation may ask for more than there is and gets all, but every rank needs a micro-batch.
    together = plan.train.micro_batch * plan.layout.data
    if sequences and min(samples, sequences) < together:
        yield Problem(
            f"evaluate.sequences={sequences}, {samples} validation samples of {seq_length} tokens: "
            f"fewer than the {together} that all ranks take at once",
            key="evaluate.sequences",
            remedy="raise it, or plugins.python_source.validation or max_bytes; 0 turns evaluation off",
        )
