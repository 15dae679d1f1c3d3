"""Chance by name: the same names give the same draw, on every machine and every numpy version.

A random generator would tie a draw to the ones before it, and numpy promises no stable streams
(NEP 19); a hash does neither.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

SEPARATOR = "\x1f"


def draws(*names: str | int) -> tuple[float, float, float, float]:
    """Four independent uniform numbers in [0, 1) that belong to these names."""
    digest = hashlib.sha256(_bytes(SEPARATOR.join(str(name) for name in names))).digest()
    first, second, third, fourth = (_fraction(digest[i : i + 8]) for i in range(0, 32, 8))
    return first, second, third, fourth


def keys(*names: str | int, last: Iterable[str | int]) -> list[bytes]:
    """For each of `last` a key to sort by, in the order of `draws(*names, each)`."""
    begun = hashlib.sha256(_bytes(SEPARATOR.join([*(str(name) for name in names), ""])))
    found = []
    for each in last:
        own = begun.copy()
        own.update(_bytes(str(each)))
        found.append(own.digest())
    return found


def shuffled(names: Sequence[str], *key: str | int) -> list[int]:
    """Indices of `names` in an order that only the names and `key` decide."""
    drawn = keys(*key, last=names)
    return sorted(range(len(names)), key=lambda i: (drawn[i], names[i]))


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _fraction(eight_bytes: bytes) -> float:
    # 53 bits: what a float holds, so that the result never rounds up to 1.
    return (int.from_bytes(eight_bytes, "big") >> 11) / 2**53
