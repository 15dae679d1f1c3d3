"""Whether the `apex` installed here is NVIDIA's: the index's package of that name is a web toolkit."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable
from pathlib import Path

from dsplugins.contracts import Plan, Problem

REMEDY = (
    "it is in NVIDIA's container images (github.com/NVIDIA/apex); `pip install apex` brings another package"
)
REBUILD = "build apex with its CUDA extensions for this torch"


def nvidias() -> bool | None:
    """True for NVIDIA's, False for another package, None for none. Imports nothing of it."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return None
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    return any(
        (folder / part).exists() for folder in folders for part in ("multi_tensor_apply", "optimizers")
    )


def chosen(key: str, plan: Plan, extension: str) -> Iterable[Problem]:
    """What stands against the option `key`, which takes `extension`, a module that is built with apex."""
    if plan.slots.get("platform") == "cpu":
        yield Problem(f"{key} needs CUDA, but the platform is cpu", key, "leave it out, or platform cuda")
    if not nvidias():
        found = "isn't installed here" if nvidias() is None else "isn't the `apex` that is installed here"
        yield Problem(f"{key} needs NVIDIA's apex, which {found}", key, REMEDY, kind="environment")
    elif importlib.util.find_spec(extension) is None:
        said = f"{key} needs apex's CUDA extension {extension}, which isn't built here"
        yield Problem(said, key, "build apex with its C++ and CUDA extensions", kind="environment")
    elif reason := _not_loaded(extension):
        said = f"{key} needs apex's CUDA extension {extension}, which can't be loaded: {reason}"
        yield Problem(said, key, REBUILD, kind="environment")


def unusable(key: str) -> Iterable[Problem]:
    """What keeps megatron-core from any optimizer: it makes apex's first where that is installed, and
    transformer-engine isn't, and that needs `amp_C`.
    """
    if not nvidias() or importlib.util.find_spec("transformer_engine") is not None:
        return
    if reason := _not_loaded("amp_C"):
        said = f"megatron-core takes the apex that is installed, whose amp_C can't be loaded: {reason}"
        yield Problem(said, key, f"{REBUILD}, or uninstall it", kind="environment")


def _not_loaded(extension: str) -> str | None:
    """Why it can't be imported."""
    importlib.import_module("torch")  # whose libraries it needs
    try:
        importlib.import_module(extension)
    except ImportError as error:
        return str(error)
    return None


__all__ = ["chosen", "nvidias", "unusable"]
