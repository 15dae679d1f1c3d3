"""Numbers as people read them, and text to be shown as it stands."""

from __future__ import annotations


class Verbatim(str):
    """No value that YAML would write its own way: shown as it stands."""


def size(count: float) -> str:
    """Bytes: `18.07 GiB`, `3.5 MiB`, `12 KiB`, in the largest unit of which there is a tenth."""
    for unit, digits, power in (("GiB", 2, 30), ("MiB", 1, 20)):
        if count >= 0.1 * 2**power:
            return f"{count / 2**power:.{digits}f} {unit}"
    return f"{count / 2**10:.0f} KiB"


def operations(count: float) -> str:
    """Floating-point operations in four digits: `250.5 GFLOP`, `6.749 MFLOP`."""
    for unit, power in (("TFLOP", 12), ("GFLOP", 9), ("MFLOP", 6)):
        if count >= 0.99995 * 10**power:
            return f"{count / 10**power:.4g} {unit}"
    return f"{count / 10**3:.4g} kFLOP"


def duration(seconds: float) -> str:
    """`3 min 17 s`, `2 d 4 h`: the two largest units."""
    units: list[str] = []
    rest = round(seconds)
    for name, length in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, rest = divmod(rest, length)
        if count or units:
            units.append(f"{count} {name}")
    return " ".join(units[:2]) or "0 s"


__all__ = ["Verbatim", "duration", "operations", "size"]
