"""The C++ extension that megatron-core compiles for `mla_up_proj` when it is first used."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

NAME = "share_storage_ext"
"""megatron/core/tensor_parallel/random.py."""
LONGEST = 600.0
"""Seconds that no build of these few lines takes."""


def left_over() -> Path | None:
    """The lock of a build that was killed: torch 2.11 would wait for it without end and without a word. In
    later ones its being there means nothing.
    """
    from torch.utils import cpp_extension

    if not hasattr(cpp_extension, "FileBaton"):
        return None
    lock = folder() / "lock"
    try:
        age = time.time() - lock.stat().st_mtime
    except OSError:
        return None
    return lock if age > LONGEST else None


def folder() -> Path:
    """Where torch builds it for this Python and this CUDA (torch/utils/cpp_extension.py)."""
    if root := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(root) / NAME
    import torch
    from torch.utils.cpp_extension import get_default_build_root

    cuda = f"cu{torch.version.cuda.replace('.', '')}" if torch.version.cuda else "cpu"
    python = f"py{sys.version_info.major}{sys.version_info.minor}{getattr(sys, 'abiflags', '')}"
    return Path(get_default_build_root()) / f"{python}_{cuda}" / NAME
