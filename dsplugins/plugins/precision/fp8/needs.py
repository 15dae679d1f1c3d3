"""What a backend of `fp8_v3` needs of a recipe and of a machine, found before a run."""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Iterable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from dsplugins.contracts import Problem
from dsplugins.plugins.precision.widths import uneven

if TYPE_CHECKING:
    from dsplugins.contracts import Plan, Settings
    from dsplugins.plugins.precision.fp8_v3 import Fp8V3Options

ALL = ("fprop", "dgrad", "wgrad")
KEY = "plugins.fp8_v3.backend"
ANYWHERE = "name the backend reference, which runs anywhere"
HOPPER = (9, 0)
MULTIPLE = 16
"""Of each width of a matrix: rows of codes must start at multiples of 16 bytes."""
DEEP_GEMM = ("fp8_gemm_nt", "m_grouped_fp8_gemm_nt_contiguous")
"""What is called of it; its first releases, and other packages of that name, lack some."""
GET_DEEP_GEMM = (
    "install the release of sgl-deep-gemm that was built for this torch (0.1.5 for torch 2.11, 0.2.2 for "
    f"torch 2.14); or {ANYWHERE}"
)
CUBLAS = (12, 9)
"""The CUDA release whose cuBLASLt scales by 1 x 128 and 128 x 128 tiles first."""


def of_recipe(options: Fp8V3Options, plan: Plan, settings: Settings) -> Iterable[Problem]:
    """A platform without CUDA, widths that the kernels can't take, a format that they don't give."""
    backend = options.backend
    if plan.slots.get("platform") == "cpu":
        yield Problem(f"fp8_v3's backend {backend} needs CUDA, but the platform is cpu", KEY, ANYWHERE)
    if backend == "deepgemm" and options.outside == "fp32":
        said = "DeepGEMM's products come in BF16, but plugins.fp8_v3.outside is fp32"
        yield Problem(said, KEY, "leave outside at bf16, or name the backend torch or reference")
    if set(options.products) != set(ALL):
        said = f"fp8_v3's backend {backend} multiplies FP8 only, but products leaves some out"
        yield Problem(said, "plugins.fp8_v3.products", f"all three, or {ANYWHERE}")
    for said in uneven(settings.model, plan, MULTIPLE):
        said = f"fp8_v3's backend {backend} takes widths of multiples of {MULTIPLE}, but {said}"
        yield Problem(said, KEY, f"another size, or {ANYWHERE}")


def of_machine(backend: str) -> Iterable[Problem]:
    """No Hopper, a CUDA that is too old, a library that isn't there."""
    import torch

    on_gpu = torch.cuda.is_available()
    if on_gpu and (found := torch.cuda.get_device_capability()) != HOPPER:
        said = f"fp8_v3's backend {backend} multiplies on Hopper (sm_90), this GPU is sm_{found[0]}{found[1]}"
        yield _lacks(said, ANYWHERE)
    if importlib.util.find_spec("triton") is None:
        said = f"fp8_v3's backend {backend} needs triton, which isn't installed here"
        yield _lacks(said, "install a CUDA build of torch, which brings it along")
    if backend == "torch" and not _block_scaling(torch.version.cuda):
        said = (
            f"fp8_v3's backend torch needs a torch for CUDA 12.9 or newer, this one has {torch.version.cuda}"
        )
        yield _lacks(said, ANYWHERE)
    if backend == "deepgemm":
        yield from _deep_gemm(on_gpu)


def _block_scaling(cuda: str | None) -> bool:
    return cuda is not None and tuple(map(int, cuda.split(".")[:2])) >= CUBLAS


def _deep_gemm(on_gpu: bool) -> Iterable[Problem]:
    """It builds and loads CUDA code on import: looked into only where there is a GPU."""
    spec = importlib.util.find_spec("deep_gemm")
    if spec is None:
        yield _lacks("fp8_v3's backend deepgemm needs DeepGEMM, which isn't installed here", GET_DEEP_GEMM)
        return
    if not on_gpu:
        return
    if said := _unfit(spec.submodule_search_locations or ()):
        yield _lacks(f"this deep_gemm {said}", GET_DEEP_GEMM)
        return
    try:
        module = import_module("deep_gemm")
    except Exception as error:  # its loader raises what it likes
        yield _lacks(f"deep_gemm can't be imported: {type(error).__name__}: {error}", GET_DEEP_GEMM)
        return
    missing = [name for name in DEEP_GEMM if not hasattr(module, name)]
    if missing:
        yield _lacks(f"this deep_gemm has no {', '.join(missing)}", GET_DEEP_GEMM)


def _unfit(folders: Iterable[str]) -> str | None:
    """What is wrong with a deep_gemm's library; to be asked before it is imported. Its own loader goes on
    where this torch lacks a function, and reads torch's structures as another version lays them out.
    """
    with suppress(ImportError):
        import_module("tvm_ffi")  # which it needs; where that is missing, loading says so
    for library in (file for folder in folders for file in sorted(Path(folder).glob("_C*.so"))):
        try:
            ctypes.CDLL(str(library), mode=os.RTLD_NOW)
        except OSError as error:
            other = "was built for another torch" if "undefined symbol" in str(error) else "can't be loaded"
            return f"{other}: {error}"
    return None


def _lacks(said: str, remedy: str) -> Problem:
    return Problem(said, KEY, remedy, kind="environment")
