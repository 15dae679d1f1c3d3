"""A run without a GPU: gloo between processes, `torch.cuda` led to the CPU."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from dsplugins.contracts import Problem
from dsplugins.hookspecs import hookimpl

if TYPE_CHECKING:
    import torch

    from dsplugins.contracts import Plan, Platform

KIB = 1 if sys.platform == "darwin" else 1024
"""Bytes in a unit of `ru_maxrss`."""

GIB = 2**30
LEAST = GIB // 4
"""Bytes of a process's own that torch and megatron-core take."""


class CpuPlatform:
    """`contracts.Platform` of processes on CPUs."""

    device_type = "cpu"
    distributed_backend = "gloo"

    def prepare(self, local_rank: int) -> torch.device:
        """Redirect `torch.cuda`, turn torch.compile off (20 s in the first step), return the CPU."""
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        import torch

        from dsplugins.cuda_redirect import install

        install()
        late = "megatron.core.jit" in sys.modules
        torch._dynamo.config.disable = True
        from megatron.core.jit import disable_jit_fuser

        disable_jit_fuser()
        if late:  # functions that core has decorated already
            torch.compiler.set_stance("force_eager")
        return torch.device("cpu")

    def problems(self, local_world_size: int) -> Iterable[Problem]:
        """Too many processes for the memory; more than there are cores is slow, not wrong."""
        needed, there = local_world_size * LEAST, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if needed > there:
            said = f"{local_world_size} processes take {needed // GIB} GiB before they hold any number"
            yield Problem(
                f"{said} of a model, this machine has {there // GIB}",
                key="run.world_size",
                remedy="start fewer processes, or on more machines (dsplugins launch)",
                kind="environment",
            )

    def synchronize(self) -> None:
        """Operators on the CPU have finished when they return."""

    def peak_memory(self) -> int:
        """Bytes: the largest resident set that this process ever had."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB


class Cpu:
    """CPU processes with gloo: for tests, first runs and debugging; every number is a real one.

    megatron-core has no CPU path of its own; `dsplugins.cuda_redirect` lists what torch is made to answer.
    """

    contract = ">=1.0,<2"

    @hookimpl
    def ds_platform(self, plan: Plan) -> Platform:
        """The CPU platform."""
        return CpuPlatform()

    @hookimpl
    def ds_settings(self, plan: Plan) -> Mapping[str, object]:
        """Fused kernels need CUDA: all of them off."""
        off = (
            "apply_rope_fusion",
            "barrier_with_L1_time",
            "batch_p2p_sync",
            "bias_activation_fusion",
            "bias_dropout_fusion",
            "cross_entropy_loss_fusion",
            "gradient_accumulation_fusion",
            "masked_softmax_fusion",
            "moe_permute_fusion",
            "moe_router_fusion",
            "persist_layer_norm",
        )
        return {"model.use_cpu_initialization": True} | {f"model.{name}": False for name in off}
