"""The arithmetic behind each name of `fp8_v3`'s option `backend`. Imported from hook bodies only."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dsplugins.plugins.precision.fp8.arithmetic import Arithmetic


@cache
def arithmetic(backend: str) -> Arithmetic:
    """The same object at each call."""
    if backend == "reference":
        from dsplugins.plugins.precision.fp8.reference import Reference

        return Reference()
    raise AssertionError(f"an option of fp8_v3 without an arithmetic: {backend}")
