"""What `dsplugins doctor` finds out by looking: devices, communication, packages in each other's way."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections import defaultdict
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.utils import canonicalize_name

from dsplugins import apex, cudnn


def row(what: str, found: str, state: str, remedy: str = "") -> dict[str, str]:
    """One thing looked at; state `ok`, `-` (not needed by every run) or `WRONG`."""
    assert state in ("ok", "-", "WRONG")
    return {"what": what, "found": found, "state": state, "remedy": "" if state == "ok" else remedy}


def rows() -> Iterator[dict[str, str]]:
    """Every check that needs more than a version number."""
    cuda = False
    try:
        torch: Any = importlib.import_module("torch")
    except Exception as error:
        yield row("torch import", f"{type(error).__name__}: {error}", "WRONG", "reinstall torch")
    else:
        cuda = torch.cuda.is_available()
        yield _cuda(torch)
        yield _gloo(torch)
        yield _nccl(torch, cuda)
    yield _megatron()
    if cuda and importlib.util.find_spec("transformer_engine"):
        yield _transformer_engine()
    if cuda:
        yield _cudnn()
    yield _apex()
    yield _duplicates()


def _cuda(torch: Any) -> dict[str, str]:
    if torch.cuda.is_available():
        names = sorted({torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())})
        found = f"{torch.cuda.device_count()} x {', '.join(names)}, CUDA {torch.version.cuda}"
        return row("CUDA", found, "ok")
    built = (
        f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without"
    )
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if os.path.exists("/dev/nvidiactl") and not hidden:
        remedy = (
            "the driver is too old for this torch, or torch is a build without CUDA: compare `nvidia-smi`"
        )
        return row("CUDA", f"a GPU is here, but torch can't use it; {built}", "WRONG", remedy)
    return row("CUDA", f"no device; {built}", "-", "recipes with the plugin cpu run without; cuda needs one")


def _gloo(torch: Any) -> dict[str, str]:
    """Really opened: gloo looks up this machine's own name, which fails in some containers."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_gloo_available():
        return row("gloo", "not in this torch", "WRONG", "install torch from its own index or from PyPI")
    try:
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
        distributed.destroy_process_group()
    except Exception as error:
        remedy = "set GLOO_SOCKET_IFNAME=lo, or give this machine's name an address in /etc/hosts"
        return row("gloo", f"does not start: {error}".splitlines()[0], "WRONG", remedy)
    return row("gloo", "starts", "ok")


def _nccl(torch: Any, cuda: bool) -> dict[str, str]:
    if torch.distributed.is_available() and torch.distributed.is_nccl_available():
        version = ".".join(map(str, torch.cuda.nccl.version())) if cuda else "in torch"
        return row("NCCL", version, "ok")
    return row("NCCL", "not in this torch", "WRONG" if cuda else "-", "the plugin cuda needs it")


def _megatron() -> dict[str, str]:
    """Whether `import megatron.core` gives the installed distribution, and no checkout in front of it."""
    try:
        spec = importlib.util.find_spec("megatron.core")
        installed = metadata.distribution("megatron-core").locate_file("megatron/core/__init__.py")
    except (ImportError, metadata.PackageNotFoundError):
        return row("megatron.core", "not installed", "WRONG", "pip install dsplugins")
    origin = spec.origin if spec and spec.origin else "nowhere"
    expected = Path(str(installed))
    if expected.exists() and Path(origin).resolve() != expected.resolve():
        remedy = "take the other one off PYTHONPATH, or uninstall it: dsplugins needs the released package"
        return row("megatron.core", f"is imported from {origin}", "WRONG", remedy)
    return row("megatron.core", "is the installed one", "ok")


def _transformer_engine() -> dict[str, str]:
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:
        said = f"can't be imported: {type(error).__name__}: {error}".splitlines()[0]
        remedy = "pip install 'transformer-engine[pytorch]' for this CUDA, or uninstall it"
        return row("transformer_engine", said, "WRONG", remedy)
    return row("transformer_engine", "can be imported", "ok")


def _cudnn() -> dict[str, str]:
    """After transformer_engine, which may have loaded another one."""
    if said := cudnn.mismatch():
        return row("cuDNN", said, "WRONG", cudnn.remedy())
    return row("cuDNN", str(cudnn.version() or "not in this torch"), "ok")


def _apex() -> dict[str, str]:
    """The index's package of that name is a web toolkit; megatron-core takes any `apex` for NVIDIA's."""
    if apex.nvidias() is None:
        return row("apex", "not installed", "-")
    if apex.nvidias():
        return row("apex", "NVIDIA's", "ok")
    return row("apex", "not NVIDIA's", "WRONG", "pip uninstall apex: megatron-core takes it for NVIDIA's")


def _duplicates() -> dict[str, str]:
    """One distribution in two versions: which one is imported depends on the order of sys.path.

    The same version twice is no harm: a checkout has its own metadata beside that of its installation.
    """
    versions: dict[str, set[str]] = defaultdict(set)
    for dist in metadata.distributions():
        if dist.metadata["Name"]:
            versions[canonicalize_name(dist.metadata["Name"])].add(dist.version)
    twice = [f"{name} {' and '.join(sorted(v))}" for name, v in sorted(versions.items()) if len(v) > 1]
    if not twice:
        return row("distributions", "each in one version", "ok")
    return row(
        "distributions", f"in two versions: {', '.join(twice)}", "WRONG", "uninstall and reinstall them"
    )
