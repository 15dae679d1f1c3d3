"""Which layers stand on which pipeline stage: each of the model exactly once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from dsplugins.audit.layers import layers
from dsplugins.model import bare

if TYPE_CHECKING:
    from dsplugins.audit.built import Placed
    from dsplugins.contracts import Plan, Settings


def differences(run: Placed) -> Iterable[str]:
    """Layers that are missing or stand twice, MTP without a block, another layout. Collective."""
    yield from misplaced(run.plan, run.settings, _everywhere(names(run.settings.model, run.chunks)))
    yield from _layout(run)


def misplaced(plan: Plan, settings: Settings, standing: Iterable[str]) -> Iterable[str]:
    """The same of `standing`, the `names` of all stages."""
    config = settings.model
    depths = config.mtp_num_layers or 0
    owner = plan.slots.get("mtp")
    if depths and owner is None:
        yield f"model.mtp_num_layers={depths} but no plugin fills the slot mtp: core would split the output"
    if owner is not None and not depths:
        yield f"{owner} fills the slot mtp but model.mtp_num_layers is not set: megatron-core builds no block"
    expected = {f"decoder.{i}" for i in range(config.num_layers)} | {"decoder.final_layernorm"}
    expected |= {f"mtp.{i}" for i in range(depths)}
    times = Counter(standing)
    for name in sorted(expected | set(times)):
        if times[name] != (name in expected):
            yield f"{name} stands {times[name]} times in the pipeline, wanted {int(name in expected)}"


def names(config: Any, chunks: Sequence[torch.nn.Module]) -> list[str]:
    """Layers, and the decoder's last norm, on this rank."""
    found = [name for name, _, _ in layers(config, chunks)]
    final = (getattr(bare(chunk).decoder, "final_layernorm", None) for chunk in chunks)
    return [*found, *("decoder.final_layernorm" for norm in final if norm is not None)]


def _everywhere(mine: list[str]) -> Iterable[str]:
    """The names of all stages of this rank's pipeline."""
    group = parallel_state.get_pipeline_model_parallel_group()
    stages: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(stages, mine, group=group)
    return [name for stage in stages for name in stage]


def _layout(run: Placed) -> Iterable[str]:
    """megatron-core turns a text into its own layout; a schedule's own class must survive all copies."""
    from dsplugins.settings import ledger

    asked = ledger(run.plan, run.plugins).values.get("model.pipeline_model_parallel_layout")
    wanted = PipelineParallelLayerLayout if isinstance(asked, str | list) else type(asked)
    for config in run.configs:
        stands = type(config.pipeline_model_parallel_layout)
        if stands is not wanted:
            yield f"pipeline layout is {stands.__name__}, chosen was {wanted.__name__}"
            return
