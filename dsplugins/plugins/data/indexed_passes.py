"""Samples of one corpus, pass after pass, each pass a GPTDataset of megatron-core.

Core's dataset builder makes one dataset as long as the run; then the order of a sample changes with the
length of the run, and documents of different passes are shuffled into each other. Here each pass is a
dataset of its own, seeded by seed + pass: the first one is what core's builder gives for one pass, every
document comes once a pass, and a sample's place depends on its index alone.

A sample is S + 1 tokens of packed documents. No mask, position or loss ends at a document's end, as in
DeepSeek-V3 (section 4.1): core's flags that would are off.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from dsplugins.plugins.data.indexed_corpus import Corpus
from dsplugins.plugins.data.ranks import first_rank_does, seen_by_every_rank

if TYPE_CHECKING:
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

STAGED = 64
"""Passes whose index is written down at most; more are asked for of tiny corpora only."""
SHARED = "point plugins.indexed.cache or run.directory to a folder that all machines share"
TRAIN, VALIDATION = 0, 1
"""Places in core's `Split`."""


@dataclass(frozen=True)
class Part:
    """Consecutive documents of a corpus."""

    corpus: Corpus
    split: tuple[float, ...]
    """Shares of training, validation and test, as core takes them; (1,) or (0, 1) for a whole corpus."""
    role: int
    """`TRAIN` or `VALIDATION`: which of them this is."""

    @property
    def shares(self) -> str:
        """`split` as core parses it, which knows no exponents."""
        return ",".join(map(np.format_float_positional, self.split))

    @cached_property
    def bounds(self) -> tuple[int, int]:
        """First document, and the one behind the last, as core's builder rounds them."""
        from megatron.core.datasets import blended_megatron_dataset_config as core

        vector = core.parse_and_normalize_split(self.shares)
        share = core.convert_split_vector_to_split_matrix(vector)[self.role]
        count = float(len(self.corpus.files))
        return (0, 0) if share is None else (round(share[0] * count), round(share[1] * count))

    @cached_property
    def tokens(self) -> int:
        """Of all its documents."""
        begin, end = self.bounds
        return int(self.corpus.files.sequence_lengths[begin:end].sum(dtype=np.int64))

    @cached_property
    def bytes(self) -> int | None:
        """Of all its documents' texts; None where nobody counted them."""
        begin, end = self.bounds
        counted = self.corpus.bytes
        return None if counted is None else int(counted[begin:end].sum())

    def samples(self, seq_length: int) -> int:
        """In a pass; the tokens that fill no sample are left out."""
        return max(0, (self.tokens - 1) // seq_length)


class Identity:
    """What core asks a tokenizer for: the name of the corpus in its index cache, and an id it never uses."""

    def __init__(self, corpus: Corpus) -> None:
        self.unique_identifiers = {"corpus": corpus.digest}
        self.vocab_size = corpus.vocab_size
        self.eod = corpus.tokenizer.ids["eos"]


class Passes:
    """Endless samples of a part."""

    def __init__(self, part: Part, *, seq_length: int, seed: int, cache: Path) -> None:
        self.part, self.samples = part, part.samples(seq_length)
        self._seq_length, self._seed, self._cache = seq_length, seed, cache
        self._staged = 0
        self._open: dict[int, GPTDataset] = {}

    def stage(self, samples: int) -> None:
        """Write the index of the passes that so many samples need. Collective; nothing is written twice.

        Raises EnvironmentUnfit where it can't be written, or not be seen from this machine.
        """
        self._staged = min(-(-samples // self.samples), STAGED) if samples else 0
        folders = [self._folder(number) for number in range(self._staged)]
        first_rank_does(lambda: self._write(folders))
        seen_by_every_rank(folders, SHARED)

    def __getitem__(self, index: int) -> torch.Tensor:
        """Sample `index`, any from 0 on: int64 [S + 1]. Pure.

        Raises EnvironmentUnfit for a token that the corpus can't have.
        """
        number, place = divmod(index, self.samples)
        sample = self._pass(number)[place]
        tokens = torch.cat((sample["tokens"], sample["labels"][-1:]))
        self.part.corpus.refuse_strangers(int(tokens.min()), int(tokens.max()))
        return tokens

    def _pass(self, number: int) -> GPTDataset:
        if number not in self._open:
            # Reads go forward, and a step may straddle two passes.
            while len(self._open) > 1:
                del self._open[next(iter(self._open))]
            # Beyond what is written down, each rank makes its own in memory: no rank waits for another.
            folder = self._folder(number) if number < self._staged else None
            self._open[number] = self._dataset(number, folder)
            assert len(self._open[number]) == self.samples
        return self._open[number]

    def _dataset(self, number: int, cache: Path | None) -> GPTDataset:
        from megatron.core.datasets.gpt_dataset import GPTDataset
        from megatron.core.datasets.utils import Split

        corpus, role = self.part.corpus, Split(self.part.role)
        config = self._config(number, cache)
        return GPTDataset(corpus.files, str(corpus.prefix), self._documents, None, role, config)

    @cached_property
    def _documents(self) -> NDArray[np.int32]:
        return np.arange(*self.part.bounds, dtype=np.int32)

    def _config(self, number: int, cache: Path | None) -> GPTDatasetConfig:
        from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

        return GPTDatasetConfig(
            random_seed=(self._seed + number) % 2**32,
            sequence_length=self._seq_length,
            blend=([str(self.part.corpus.prefix)], None),
            split=self.part.shares,
            tokenizer=Identity(self.part.corpus),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
            path_to_cache=str(cache) if cache else "",  # None would mean beside the corpus
        )

    def _folder(self, number: int) -> Path:
        """Named after all that the index depends on."""
        corpus, part = self.part.corpus, self.part
        facts: list[Any] = [metadata.version("megatron-core"), str(corpus.prefix), corpus.digest, part.split]
        facts += [part.role, self._seq_length, self._seed, number]
        name = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
        return self._cache / f"{corpus.prefix.name}-{name}"

    def _write(self, folders: Sequence[Path]) -> None:
        """Each whole or not at all: a run may be killed here, or another one may do the same."""
        for number, folder in enumerate(folders):
            if folder.exists():
                continue
            partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
            partial.mkdir(parents=True)
            try:
                self._dataset(number, partial)
                partial.rename(folder)
            except OSError:
                if not folder.exists():
                    raise
            finally:
                shutil.rmtree(partial, ignore_errors=True)


__all__ = ["TRAIN", "VALIDATION", "Part", "Passes"]
