"""Baselines against counting by hand."""

import math

import numpy as np
import pytest

from dsplugins.plugins.data.ngram import bigram_log_probs, cross_entropies, unigram_log_probs

TEXT = [0, 1, 0, 1, 0, 2, 2, 1]
WINDOWS = [[0, 1, 2], [2, 3, 0]]
V = 4


def by_hand(text, windows, order):
    """Laplace smoothing spelled out: one count at a time, no arrays."""
    total = []
    for window in windows:
        for before, target in zip(window, window[1:], strict=False):
            if order == 1:
                share = (text.count(target) + 1) / (len(text) + V)
            else:
                pairs = list(zip(text, text[1:], strict=False))
                row = sum(first == before for first, _ in pairs)
                share = (pairs.count((before, target)) + 1) / (row + V)
            total.append(-math.log(share))
    return sum(total) / len(total)


def arrays(*lists):
    return [np.array(values, dtype=np.uint16) for values in lists]


def test_against_counting_by_hand():
    found = cross_entropies(*arrays(TEXT, WINDOWS), V)
    assert found["unigram"] == pytest.approx(by_hand(TEXT, WINDOWS, 1), rel=1e-12)
    assert found["bigram"] == pytest.approx(by_hand(TEXT, WINDOWS, 2), rel=1e-12)
    # -(ln 4/12 + ln 3/12 + ln 1/12 + ln 4/12) / 4
    assert found["unigram"] == pytest.approx(1.5171, abs=1e-4)


def test_both_are_distributions():
    (text,) = arrays(TEXT)
    assert np.exp(unigram_log_probs(text, V)).sum() == pytest.approx(1)
    assert np.exp(bigram_log_probs(text, V)).sum(axis=1) == pytest.approx(np.ones(V))


def test_ids_do_not_wrap_in_sixteen_bits():
    text = np.array([259, 259, 259, 258], dtype=np.uint16)
    counts = np.exp(bigram_log_probs(text, 260)) * (3 + 260)
    assert counts[259, 259] == pytest.approx(3) and counts[259, 258] == pytest.approx(2)


def test_a_chain_is_learned_by_the_bigram_only():
    text = np.tile(np.arange(4, dtype=np.uint16), 5000)
    found = cross_entropies(text, text[:41].reshape(1, 41), 4)
    assert found["unigram"] == pytest.approx(math.log(4), abs=1e-3)
    assert found["bigram"] < 0.01
