"""Chance by name: the same names give the same draw, on every machine and every numpy version.

A random generator would tie a draw to the ones before it, and numpy promises no stable streams
(NEP 19); a hash does neither.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence


def draws(*names: str | int) -> tuple[float, float, float, float]:
    """Four independent uniform numbers in [0, 1) that belong to these names."""
    text = "\x1f".join(str(name) for name in names)
    digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
    first, second, third, fourth = (_fraction(digest[i : i + 8]) for i in range(0, 32, 8))
    return first, second, third, fourth


def shuffled(names: Sequence[str], *key: str | int) -> list[int]:
    """Indices of `names` in an order that only the names and `key` decide."""
    return sorted(range(len(names)), key=lambda i: (draws(*key, names[i]), names[i]))


def _fraction(eight_bytes: bytes) -> float:
    # 53 bits: what a float holds, so that the result never rounds up to 1.
    return (int.from_bytes(eight_bytes, "big") >> 11) / 2**53
