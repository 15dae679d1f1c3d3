"""A run on NVIDIA GPUs, one process each, NCCL between them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

from dsplugins.contracts import EnvironmentUnfit, Problem
from dsplugins.hookspecs import hookimpl

if TYPE_CHECKING:
    import torch

    from dsplugins.contracts import Plan, Platform


class CudaPlatform:
    """`contracts.Platform` of processes on NVIDIA GPUs."""

    device_type = "cuda"
    distributed_backend = "nccl"

    def prepare(self, local_rank: int) -> torch.device:
        """Take GPU `local_rank`. Raises `EnvironmentUnfit` when there is none, or no NCCL."""
        import torch

        # The same number on every rank, so that it is told once.
        ranks = max(local_rank + 1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        for problem in self.problems(ranks):
            raise EnvironmentUnfit(f"{problem.message}: {problem.remedy}")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        return device

    def problems(self, local_world_size: int) -> Iterable[Problem]:
        """Too few GPUs for this many processes, or a torch without NCCL."""
        import torch

        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count < local_world_size:
            yield Problem(
                f"platform cuda needs {local_world_size} GPUs on this machine, torch sees {count}",
                key="plugins.cuda",
                remedy="start fewer processes, or on more machines (dsplugins launch); mend the driver "
                "(nvidia-smi); or name the plugin cpu instead",
                kind="environment",
            )
        if count and not torch.distributed.is_nccl_available():
            yield Problem(
                "platform cuda needs NCCL, which this torch lacks",
                key="plugins.cuda",
                remedy="install a CUDA build of torch",
                kind="environment",
            )

    def synchronize(self) -> None:
        """Wait for everything that was launched on this process's GPU."""
        import torch

        torch.cuda.synchronize()

    def peak_memory(self) -> int:
        """Bytes: the most that torch's allocator held for tensors on this GPU."""
        import torch

        return torch.cuda.max_memory_allocated()


class Cuda:
    """NVIDIA GPUs with NCCL, one process a GPU. Patches nothing."""

    contract = ">=1.0,<2"

    @hookimpl
    def ds_platform(self, plan: Plan) -> Platform:
        """The CUDA platform."""
        return CudaPlatform()
