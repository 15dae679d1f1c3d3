"""megatron-core's parallel world in miniature, in any process, and gone without a trace afterwards."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator
from itertools import compress
from operator import not_
from threading import Thread
from types import FunctionType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

DDP_HOOK = "DistributedDataParallel._make_backward_post_hook."
"""Where megatron-core makes the hooks that keep a model alive."""


def prepare_cpu() -> torch.device:
    """Make this process a CPU one, as the plugin `cpu` does in a run."""
    from importlib import metadata

    (entry,) = metadata.entry_points(group="dsplugins.platform", name="cpu")
    return entry.load()().ds_platform(plan=None).prepare(0)


@contextlib.contextmanager
def model_parallel(
    tensor: int = 1,
    pipeline: int = 1,
    virtual_pipeline: int | None = None,
    expert: int = 1,
    expert_tensor: int = 1,
    context: int = 1,
    seed: int = 1234,
    order: str = "tp-cp-ep-dp-pp",
) -> Iterator[None]:
    """megatron-core's parallel groups and random states, with the recipe's short names.

    Data parallel is what is left of the world. Groups are destroyed on leaving. To be entered by all
    ranks together; `virtual_pipeline` 1 counts as none.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    chunks = virtual_pipeline if virtual_pipeline and virtual_pipeline > 1 else None
    with temporary_groups():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tensor,
            pipeline_model_parallel_size=pipeline,
            virtual_pipeline_model_parallel_size=chunks,
            expert_model_parallel_size=expert,
            expert_tensor_parallel_size=expert_tensor,
            context_parallel_size=context,
            order=order,
        )
        model_parallel_cuda_manual_seed(seed)
        yield


@contextlib.contextmanager
def temporary_groups() -> Iterator[None]:
    """On leaving, destroy megatron-core's groups and every process group made inside.

    What core keeps for the whole process, in the shape of the last run, is forgotten too. Models and groups
    that a caller still holds are freed by the next.
    """
    import torch.distributed as dist
    from megatron.core import parallel_state

    before = set(dist.distributed_c10d._world.pg_map)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        _destroy_all_but(before)
        _forget()
        _cut_circles()
        free()


_DESTROYED: list[list[object]] = []
"""Groups that are no longer used, each in a list of its own until nobody else holds it."""


def _destroy_all_but(some: set[Any]) -> None:
    import torch.distributed as dist

    for group in set(dist.distributed_c10d._world.pg_map) - some:
        dist.destroy_process_group(group)
        _DESTROYED.append([group])


def free() -> None:
    """Free what nobody holds of runs that have ended: models, and process groups with three threads each.

    Those look every 10 ms whether they are to end, so groups are let go together, each by a thread.
    """
    if not _DESTROYED:
        return
    gc.collect()
    held = [sys.getrefcount(kept[0]) > 2 for kept in _DESTROYED]  # by that list and by the call
    ends = [Thread(target=kept.clear) for kept in compress(_DESTROYED, map(not_, held))]
    _DESTROYED[:] = compress(_DESTROYED, held)
    for end in ends:
        end.start()
    for end in ends:
        end.join()


def _cut_circles() -> None:
    """Two of them lead through C++, unseen by the garbage collector: a hook of core's DDP on each gradient's
    autograd node holds the model, and modules and dispatchers keep tensors whose graph holds such nodes.
    """
    import torch
    from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher

    keepers: dict[type, bool] = {}  # there are a million objects, of some thousand types
    for thing in gc.get_objects():
        kind = type(thing)
        if kind is FunctionType and thing.__qualname__.startswith(DDP_HOOK):
            for cell in thing.__closure__ or ():
                cell.cell_contents = None
        if kind not in keepers:
            keepers[kind] = issubclass(kind, torch.nn.Module | MoETokenDispatcher)
        if keepers[kind]:
            kept = vars(thing)
            for name, value in kept.items():
                if isinstance(value, torch.Tensor) and value.grad_fn is not None:
                    kept[name] = None


def _forget() -> None:
    """MTP's losses of an unfinished step, the scales of its loss and of balance losses, rotary embeddings.

    Those are kept by the cache of a method: each of them, with its process group.
    """
    import torch
    from megatron.core.models.common.embeddings import RotaryEmbedding, YarnRotaryEmbedding
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
    from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler, MTPLossLoggingHelper

    MTPLossLoggingHelper.tracker.clear()
    MTPLossAutoScaler.main_loss_backward_scale = torch.tensor(1.0)  # as core has it at first
    MoEAuxLossAutoScaler.main_loss_backward_scale = None
    for embedding in (RotaryEmbedding, YarnRotaryEmbedding):
        embedding.forward.cache_clear()


__all__ = ["model_parallel", "prepare_cpu", "temporary_groups"]
