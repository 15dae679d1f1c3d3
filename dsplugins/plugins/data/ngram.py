"""What a run should beat: n-gram models of bytes with add-one smoothing (Laplace)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dsplugins.plugins.data.tokens import Tokens


def unigram_log_probs(text: Tokens, vocab_size: int) -> NDArray[np.float64]:
    """log p(token), [V] in nats: (count + 1) / (N + V)."""
    counts = np.bincount(text, minlength=vocab_size)
    return np.log((counts + 1) / (counts.sum() + vocab_size))


def bigram_log_probs(text: Tokens, vocab_size: int) -> NDArray[np.float64]:
    """log p(token | token before), [V, V] in nats, rows by the token before: (count + 1) / (row + V)."""
    pairs = text[:-1].astype(np.int64) * vocab_size + text[1:]
    counts = np.bincount(pairs, minlength=vocab_size**2).reshape(vocab_size, vocab_size)
    return np.log((counts + 1) / (counts.sum(axis=1, keepdims=True) + vocab_size))


def cross_entropies(text: Tokens, windows: Tokens, vocab_size: int) -> dict[str, float]:
    """Nats a token of both models, fitted on `text` [N], on every next token of `windows` [n, S + 1].

    Each window's first token is only an input, as it is for the trained model.
    """
    before, target = windows[:, :-1], windows[:, 1:]
    return {
        "unigram": float(-unigram_log_probs(text, vocab_size)[target].mean()),
        "bigram": float(-bigram_log_probs(text, vocab_size)[before, target].mean()),
    }
