"""Corpora and their shares as training and validation samples: what `contracts.Data` asks for."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsplugins.contracts import Plan
from dsplugins.plugins.data.indexed_mixture import Mixture
from dsplugins.plugins.data.indexed_passes import Part, Passes
from dsplugins.plugins.data.ngram import cross_entropies

FIT_TOKENS, FIT_SAMPLES = 1 << 22, 1 << 14
"""Baselines are fitted on at most so much of the training samples."""
VALIDATION_SEED = 0
"""Validation samples are the same whatever the seed of a run is."""
TRIED = 1000
"""Documents that are looked at for a prompt."""


class IndexedData:
    """Fulfils `contracts.Data` for parts of corpora."""

    def __init__(
        self,
        plan: Plan,
        train: Sequence[Part],
        validation: Sequence[Part],
        weights: Sequence[float] | None,
        validation_weights: Sequence[float] | None,
        cache: Path,
    ) -> None:
        """Weights are shares of samples; None: each corpus as large as it is. Collective."""
        length = plan.data.seq_length
        self._seq_length, self._tokenizer = length, train[0].corpus.tokenizer
        self._evaluated, self._together = plan.evaluate.sequences, plan.train.micro_batch * plan.layout.data
        self._train = [Passes(part, seq_length=length, seed=plan.train.seed, cache=cache) for part in train]
        self._held_out = [
            Passes(part, seq_length=length, seed=VALIDATION_SEED, cache=cache) for part in validation
        ]
        self._mixture = Mixture(weights or [passes.samples for passes in self._train])
        held_out = [passes.samples for passes in self._held_out]
        self._held_out_mixture = Mixture(validation_weights or held_out)
        self._validation_size = self._held_out_mixture.until(held_out)
        for passes, samples in zip(self._train, self._mixture.taken(planned(plan)), strict=True):
            passes.stage(int(samples))
        for passes in self._held_out:
            passes.stage(passes.samples)
        self.vocab_size = max(part.corpus.vocab_size for part in (*train, *validation))
        self.facts: Mapping[str, Any] = {**self._facts(weights), "digest": digest([*train, *validation])}

    def train(self, index: int) -> torch.Tensor:
        """Training sample `index`, any from 0 on: int64 [S + 1]. Pure."""
        corpus, nth = self._mixture[index]
        return self._train[corpus][nth]

    def validation(self, index: int) -> torch.Tensor:
        """Validation sample `index` < `validation_size`: int64 [S + 1]; IndexError beyond."""
        if not 0 <= index < self._validation_size:
            raise IndexError(f"validation sample {index} of {self._validation_size}")
        corpus, nth = self._held_out_mixture[index]
        return self._held_out[corpus][nth]

    @property
    def validation_size(self) -> int:
        """Number of validation samples; none comes twice."""
        return self._validation_size

    def baselines(self) -> Mapping[str, float]:
        """Unigram and, of small vocabularies, bigram models of token ids, nats a token.

        Fitted on the first training samples, a pass of all corpora or four million tokens, and measured on
        the validation samples that the evaluation looks at. Empty when it looks at none.
        """
        count = min(self._evaluated, self.validation_size) // self._together * self._together
        if count == 0:
            return {}
        fitted = min(
            sum(passes.samples for passes in self._train), FIT_SAMPLES, FIT_TOKENS // self._seq_length
        )
        text = np.stack([self.train(index).numpy() for index in range(max(1, fitted))])
        windows = np.stack([self.validation(index).numpy() for index in range(count)])
        return cross_entropies(text, windows, self.vocab_size)

    def prompt(self) -> tuple[list[int], str] | None:
        """The beginning of a held-out document, and the tokens after it as text."""
        after = min(48, self._seq_length // 4)
        for passes in self._held_out:
            begin, end = passes.part.bounds
            for index in range(begin, min(end, begin + TRIED)):
                tokens = passes.part.corpus.document(index)[:-1]
                context = min(self._seq_length * 3 // 4, len(tokens) - after)
                if context > 0 and not passes.part.corpus.turned(tokens):
                    rest = tokens[context : context + after].tolist()
                    return tokens[:context].tolist(), self.decode(rest)
        return None

    def decode(self, tokens: Sequence[int]) -> str:
        """Token ids as text, marks by their names."""
        return self._tokenizer.decode(tokens)

    def _facts(self, weights: Sequence[float] | None) -> dict[str, Any]:
        names = [passes.part.corpus.prefix.name for passes in self._train]
        shares = np.asarray(weights or [1.0] * len(names)) / sum(weights or [len(names)])
        told = (f"{name} ({share:.4g})" for name, share in zip(names, shares, strict=True))
        facts: dict[str, Any] = {
            "source": " + ".join(told if weights else names),
            "tokenizer": self._tokenizer.sha256[:12],
            "train_documents": sum(end - begin for begin, end in (p.part.bounds for p in self._train)),
            "train_tokens": sum(passes.part.tokens for passes in self._train),
            "validation_samples": self.validation_size,
        }
        drawn = self._held_out_mixture.taken(self._validation_size) * self._seq_length
        facts["validation_tokens"] = int(drawn.sum())
        if all(passes.part.bytes is not None for passes in self._held_out):
            facts["validation_bytes"] = round(
                sum(
                    int(tokens) * (passes.part.bytes or 0) / passes.part.tokens
                    for tokens, passes in zip(drawn, self._held_out, strict=True)
                    if tokens
                )
            )
        return facts


def digest(parts: Sequence[Part]) -> str:
    """SHA-256: equal digests, equal corpora. Not of how they are split and blended."""
    return hashlib.sha256("".join(part.corpus.digest for part in parts).encode()).hexdigest()


def planned(plan: Plan) -> int:
    """Samples that a run takes at most."""
    largest = math.ceil(plan.train.global_batch.highest)
    if plan.train.steps is not None:
        return plan.train.steps * largest
    assert plan.train.tokens is not None, "plan.prepare refuses a run without an end"
    return math.ceil(plan.train.tokens / plan.data.seq_length) + largest


__all__ = ["IndexedData", "digest", "planned"]
