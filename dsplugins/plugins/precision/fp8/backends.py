"""The arithmetic behind each name of `fp8_v3`'s option `backend`. Imported from hook bodies only."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsplugins.plugins.precision.fp8.arithmetic import Arithmetic


class Deferred:
    """A backend's arithmetic, made when it is first used: `check` builds linears without its libraries."""

    def __init__(self, backend: str) -> None:
        self._backend = backend

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Deferred) and other._backend == self._backend

    def __hash__(self) -> int:
        return hash(self._backend)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # asked for by copy and pickle, before there is a backend
            raise AttributeError(name)
        return getattr(arithmetic(self._backend), name)


@cache
def arithmetic(backend: str) -> Arithmetic:
    """The same object at each call; never another one than was asked for.

    Raises ImportError where its library isn't there, which `needs` says before that.
    """
    if backend == "torch":
        from dsplugins.plugins.precision.fp8.scaled_mm import ScaledMm

        return ScaledMm()
    if backend == "deepgemm":
        from dsplugins.plugins.precision.fp8.deep_gemm import DeepGemm

        return DeepGemm()
    from dsplugins.plugins.precision.fp8.reference import Reference

    return Reference()
