"""Data: corpora in megatron-core's `.bin`/`.idx` format, blended and split."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from dsplugins.contracts import EnvironmentUnfit, Problem
from dsplugins.hookspecs import hookimpl
from dsplugins.plugins.data.indexed_options import MISSING, IndexedOptions

if TYPE_CHECKING:
    from dsplugins.contracts import Data, Plan, Settings

OTHER_CORPORA = "read other corpora than rank 0 under the same names; copy them again"


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
        from dsplugins.plugins.data.indexed_check import disagreements, opened, parts, sizes
        from dsplugins.plugins.data.indexed_data import IndexedData, digest
        from dsplugins.plugins.data.ranks import same_on_every_rank

        options = self._options
        _refuse(options.problems(plan))
        corpora, problems = opened(options)
        _refuse(problems)
        train, validation = parts(options, corpora)
        same_on_every_rank(digest([*train, *validation]), OTHER_CORPORA)
        _refuse([*disagreements(options, corpora), *sizes(options, plan, train, validation)])
        own = Path(plan.run.directory) / "data_index"
        cache = Path(options.cache).expanduser() if options.cache else own
        return IndexedData(plan, train, validation, options.weights, options.validation_weights, cache)

    @hookimpl
    def ds_here(self) -> Iterator[Problem]:
        """Whether each corpus is there."""
        from dsplugins.plugins.data.indexed_corpus import absent

        for key in ("train", "validation"):
            for prefix in self._options.prefixes(key):
                if missing := absent(Path(prefix).expanduser()):
                    yield Problem(missing, f"plugins.indexed.{key}", MISSING, kind="environment")

    @hookimpl
    def ds_check(self, plan: Plan, settings: Settings) -> Iterator[Problem]:
        """The options, the files that they name, the sidecars against both, sizes, and the vocabulary."""
        from dsplugins.plugins.data.indexed_check import disagreements, opened, parts, sizes

        options = self._options
        if wrong := list(options.problems(plan)):
            yield from wrong
            return
        corpora, problems = opened(options)
        yield from problems
        yield from disagreements(options, corpora)
        if not problems:
            yield from sizes(options, plan, *parts(options, corpora))
        largest = max(corpora.values(), key=lambda corpus: corpus.vocab_size, default=None)
        if largest and largest.vocab_size > settings.vocab_size:
            yield Problem(
                f"model.vocab_size={settings.vocab_size} is too small: the tokenizer of {largest.prefix} has "
                f"{largest.vocab_size} ids",
                "model.vocab_size",
                f"set it to {largest.vocab_size} or more",
            )


def _refuse(problems: Iterable[Problem]) -> None:
    """Raise what `ds_check` would have told."""
    found = list(problems)
    if found:
        said = "; ".join(problem.message for problem in found)
        raise EnvironmentUnfit(said) if found[0].kind == "environment" else ValueError(said)
