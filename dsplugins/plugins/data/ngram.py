"""What a run should beat: n-gram models of tokens with add-one smoothing (Laplace)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.integer]
BIGRAM = 2048
"""Largest vocabulary whose pairs are counted: 32 MiB a table."""


def unigram_log_probs(text: Ids, vocab_size: int) -> NDArray[np.float64]:
    """log p(token), [V] in nats: (count + 1) / (N + V)."""
    counts = np.bincount(text.ravel(), minlength=vocab_size)
    return np.log((counts + 1) / (counts.sum() + vocab_size))


def bigram_log_probs(text: Ids, vocab_size: int) -> NDArray[np.float64]:
    """log p(token | token before), [V, V] in nats, rows by the token before: (count + 1) / (row + V)."""
    pairs = text[..., :-1].astype(np.int64) * vocab_size + text[..., 1:]
    counts = np.bincount(pairs.ravel(), minlength=vocab_size**2).reshape(vocab_size, vocab_size)
    return np.log((counts + 1) / (counts.sum(axis=1, keepdims=True) + vocab_size))


def cross_entropies(text: Ids, windows: Ids, vocab_size: int) -> dict[str, float]:
    """Nats a token, fitted on `text` [N] or [m, S + 1], on each next token of `windows` [n, S + 1].

    Each window's first token is only an input, as it is for the trained model. Without the bigram model
    where the vocabulary is larger than `BIGRAM`.
    """
    before, target = windows[:, :-1], windows[:, 1:]
    found = {"unigram": float(-unigram_log_probs(text, vocab_size)[target].mean())}
    if vocab_size <= BIGRAM:
        found["bigram"] = float(-bigram_log_probs(text, vocab_size)[before, target].mean())
    return found
