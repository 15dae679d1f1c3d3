"""Chance by name: what it is made of, and sorting by it."""

from __future__ import annotations

import hashlib

from dsplugins.corpora.draws import draws, keys, shuffled


def test_a_draw_is_a_hash_of_its_names():
    digest = hashlib.sha256(b"sample\x1f7\x1f0").digest()
    expected = [int.from_bytes(digest[i : i + 8], "big") / 2**64 for i in range(0, 32, 8)]
    assert all(abs(got - want) <= 2**-53 for got, want in zip(draws("sample", 7, 0), expected, strict=True))


def test_keys_sort_as_the_draws_do():
    for last in (range(3000), [f"{i}\udcff.py" for i in range(300)]):
        drawn, made = [draws("order", 3, each) for each in last], keys("order", 3, last=last)
        assert sorted(range(len(last)), key=made.__getitem__) == sorted(
            range(len(last)), key=drawn.__getitem__
        )


def test_the_same_names_are_told_apart_by_their_place():
    assert shuffled(["b", "a", "b"], "x") in ([0, 2, 1], [1, 0, 2])
