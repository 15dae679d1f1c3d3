"""Whether torch's cuDNN is the one that it was built with.

Where the system has another one, transformer_engine loads that for all, and torch calls it from then on.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from dsplugins.contracts import Plan, Problem

ATTENTION = 91100
"""The first cuDNN with attention for heads of 192 and 128, 9.11."""
HOPPER = (9, 0)
"""The first processor that it has kernels of these sizes for."""


def mismatch() -> str | None:
    """What is wrong with the cuDNN that torch finds, once transformer_engine may have loaded another.

    Not by `torch.backends.cudnn.version()`, which looks once in a process, and complains once.
    """
    if importlib.util.find_spec("transformer_engine") is not None:
        with suppress(Exception):  # one that can't be imported has loaded nothing
            importlib.import_module("transformer_engine.pytorch")
    found, built = _versions()
    if found[0] == built[0] and found[1] >= built[1]:
        return None
    words = (".".join(map(str, version)) for version in (built, found))
    return "torch was built with cuDNN {}, and finds {}".format(*words)


def version() -> int:
    """Of the one that torch finds now, such as 91900; 0 without."""
    major, minor, patch = _versions()[0]
    return 10_000 * major + 100 * minor + patch


def _versions() -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(the one that is found, the one that torch was built with); zeros where this torch has none."""
    try:
        library: Any = importlib.import_module("torch._C._cudnn")
    except ImportError:
        return (0, 0, 0), (0, 0, 0)
    return tuple(library.getRuntimeVersion()), tuple(library.getCompileVersion())


def remedy() -> str:
    """How to have every library find the cuDNN that came with torch before the system's."""
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(folder) / "cudnn" / "lib" for folder in (spec and spec.submodule_search_locations) or ()]
    found = next((str(folder) for folder in folders if folder.is_dir()), "FOLDER OF TORCH'S cuDNN")
    return f"export LD_LIBRARY_PATH={found}:$LD_LIBRARY_PATH before it starts"


def attention(key: str, plan: Plan) -> Iterable[Problem]:
    """What stands against the option `key`, which takes cuDNN's attention."""
    if plan.slots.get("platform") == "cpu":
        said = f"{key}=cudnn needs CUDA, but the platform is cpu"
        yield Problem(said, key, "leave it out, or platform cuda")
        return
    import torch

    if not torch.cuda.is_available():
        return  # told by the platform
    if wrong := mismatch():
        yield Problem(f"{key}=cudnn: {wrong}", key, remedy(), kind="environment")
        return
    found = torch.cuda.get_device_capability()
    if found < HOPPER or version() < ATTENTION:
        said = f"{key}=cudnn needs sm_90 and cuDNN 9.11, here are sm_{found[0]}{found[1]} and {version()}"
        yield Problem(said, key, "leave it at torch", kind="environment")


__all__ = ["attention", "mismatch", "remedy", "version"]
