"""Every hook, in the order a run calls them. Read this file first.

A plugin is one class with any of these as methods, marked `@hookimpl`, made with its options as its
only argument, or with none where it declares no `Options`. Arguments are asked for by name: leave out
what you don't need. *Slots* have exactly one owner and return a part; *events* may have many listeners
and return what they collected.

No hook runs inside forward or backward: slots are resolved once, before training; events run at most
once a step. Import torch and megatron inside hook bodies, never at the top of the module.

What a hook gives is looked at where it gives it: what can't be its answer stops `check` and `train` with the
plugin's name, what it gave and the line where the hook begins. A class that a slot's part is made of, or that
a backend names, is to be the same one each time that it is asked for: make it once (`functools.cache`).

The host seeds torch's default generators at the start of every step from (`train.seed`, the step, the place
of the rank), so what a plugin draws from them goes on bit for bit when a run is stopped and started again.
A generator of a plugin's own must be made, or seeded, from the step: nobody saves its state.

A plugin's class may also declare, as plain attributes:

- `Options`, a dataclass: what a recipe may set below its name; None or absent where there is nothing to set.
- `contract`, the versions of this contract that it works with: `">=1.0,<2"`.
- `requires` and `conflicts`, names of plugins or slots.
- `env`, environment variables that it needs: `{"NAME": "value"}`. `train` sets them before torch is
  imported, and refuses to start with other values; `launch` exports them.
- `told`, a word or two about the choice that it stands for: a run shows them beside its name.
- `stand_in`, for a plugin whose parts can't be made without a library or a GPU: the name of another plugin
  of its slot whose parts have the same parameters. `dsplugins check` builds with that one; a run never does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch
    from megatron.core.models.backends import BackendSpecProvider
    from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    from dsplugins.contracts import (
        Data,
        DispatcherFactory,
        Evaluation,
        ExpertsFactory,
        PipelineSchedule,
        Plan,
        Platform,
        PluginState,
        Problem,
        RouterFactory,
        RunEnd,
        Settings,
        Step,
    )

hookspec = pluggy.HookspecMarker("dsplugins")
hookimpl = pluggy.HookimplMarker("dsplugins")


# -- before anything is built ---------------------------------------------------------------------


@hookspec
def ds_settings(plan: Plan) -> Mapping[str, object]:
    """Event. Megatron fields that this plugin needs, by dotted recipe key.

    Keys are `model.<field>`, `optimizer.<field>` or `ddp.<field>` with megatron-core's own field names. Two
    writers of one field with two values stop the run; the recipe's own sections are writers too. A value
    may be a [Schedule](#schedule) where the field is read anew in each step (`moe_router_bias_update_rate`,
    `mtp_loss_scaling_factor`, `moe_aux_loss_coeff`): the host sets this step's number in every module's
    `config`, so the module reads `self.config.<field>` in `forward`.
    """
    raise NotImplementedError


@hookspec
def ds_check(plan: Plan, settings: Settings) -> Iterable[Problem]:
    """Event. What is wrong with this plan, found without a device: sizes, ranges, conflicts."""
    raise NotImplementedError


@hookspec
def ds_here(plan: Plan) -> Iterable[Problem]:
    """Event. What this machine lacks for the run and can be seen without torch: files, packages.

    Asked before a process is started, so it must neither import torch nor take long.
    """
    raise NotImplementedError


@hookspec
def ds_check_built(plan: Plan, stages: Sequence[Sequence[torch.nn.Module]]) -> Iterable[Problem]:
    """Event. What is wrong with this plan, seen from the whole model. Called by `dsplugins check` only.

    `stages` holds the model chunks of one rank of each pipeline stage, bare, on the meta device: names and
    shapes of parameters, no values.
    """
    raise NotImplementedError


@hookspec(firstresult=True)
def ds_platform(plan: Plan) -> Platform:
    """Slot. Where tensors live and which library moves them."""
    raise NotImplementedError


@hookspec(firstresult=True)
def ds_data(plan: Plan) -> Data:
    """Slot. Samples by index. Called on every rank, after the process group is up."""
    raise NotImplementedError


# -- the model, from the inside out ---------------------------------------------------------------


@hookspec(firstresult=True)
def ds_backend(plan: Plan, config: MLATransformerConfig) -> BackendSpecProvider:
    """Slot. Linears, norms, core attention: attention, MLPs, experts and MTP are built from it."""
    raise NotImplementedError


@hookspec(firstresult=True)
def ds_precision(
    plan: Plan, config: MLATransformerConfig, backend: BackendSpecProvider
) -> BackendSpecProvider:
    """Slot. The number format: the backend itself, or one that wraps its linears.

    Its fields come through `ds_settings`: `model.bf16` and `model.fp16`, and the same two of `optimizer`;
    `model.params_dtype` follows from them, and `model.pipeline_dtype` where there is a pipeline.
    `ddp.grad_reduce_in_fp32` says what gradients are summed in. Asked twice, the parts are of the same
    classes.

    What is returned may have more methods than core's protocol; whoever builds from a backend asks for them
    and takes the ordinary part where there is none. `dense_mlp()`, `expert_mlp()` and `shared_expert_mlp()`
    return classes in the place of core's `MLP` of a layer without experts, of its `MLP` of a routed expert
    and of `SharedExpertMLP`; `grouped_products()` returns `contracts.GroupedProducts` for experts with packed
    weights.
    """
    raise NotImplementedError


@hookspec(firstresult=True)
def ds_attention(plan: Plan, config: MLATransformerConfig, backend: BackendSpecProvider) -> ModuleSpec:
    """Slot. Spec of a whole self-attention, `params` with `attn_mask_type` (MTP asks for it).

    megatron-core makes it as `module(config=, layer_number=, pg_collection=, name=, **params)`, with
    `submodules=` where the spec has some; `layer_number` counts from 1. It calls `forward(hidden,
    attention_mask=, rotary_pos_emb=, **more)`: hidden [S, B, H] (S/TP of the sequence with sequence
    parallel), masks and positions may be None. It returns `(out, bias)`: out shaped like hidden, bias [H]
    that is yet to be added, or None. `linear_*`, norms and `core_attention` that `submodules` names are
    audited; an attention of one piece names none.
    """
    raise NotImplementedError


@hookspec(firstresult=True)
def ds_router(plan: Plan, config: MLATransformerConfig) -> RouterFactory:
    """Slot. Factory of the module that sends tokens to experts; see `contracts.RouterFactory`."""
    raise NotImplementedError


@hookspec(firstresult=True)
def ds_experts(plan: Plan, config: MLATransformerConfig, backend: BackendSpecProvider) -> ExpertsFactory:
    """Slot. Factory of the module that computes this rank's routed experts."""
    raise NotImplementedError


@hookspec(firstresult=True)
def ds_dispatcher(plan: Plan, config: MLATransformerConfig) -> DispatcherFactory:
    """Slot. Factory of the object that carries tokens to the ranks of their experts and back."""
    raise NotImplementedError


@hookspec(firstresult=True)
def ds_mtp(
    plan: Plan,
    config: MLATransformerConfig,
    decoder: TransformerBlockSubmodules,
    backend: BackendSpecProvider,
) -> ModuleSpec:
    """Slot. Spec of the multi-token-prediction block, made from the whole decoder's layer specs.

    `decoder.layer_specs` holds all layers of the model, not only those of this stage.
    """
    raise NotImplementedError


@hookspec(firstresult=True)
def ds_model(plan: Plan, settings: Settings) -> Callable[..., torch.nn.Module]:
    """Slot. Factory of a model chunk.

    Called as `factory(decoder=TransformerBlockSubmodules, mtp=ModuleSpec | None, pre_process=bool,
    post_process=bool, vp_stage=int | None)`; `decoder` holds this chunk's layers.
    """
    raise NotImplementedError


@hookspec(firstresult=True)
def ds_recompute(plan: Plan, config: MLATransformerConfig, chunk: torch.nn.Module) -> bool:
    """Slot, optional. Attach an activation-memory policy to a built chunk, before it is wrapped.

    Must not change any number. Return True.
    """
    raise NotImplementedError


@hookspec(firstresult=True)
def ds_schedule(plan: Plan) -> PipelineSchedule:
    """Slot. Chunks a rank, the forward-backward function, its part of gradient finalisation."""
    raise NotImplementedError


@hookspec(firstresult=True)
def ds_optimizer(config: OptimizerConfig, chunks: Sequence[torch.nn.Module]) -> MegatronOptimizer:
    """Slot. The optimizer over DDP-wrapped chunks. Must follow the loop's rate, which is written as `lr` into
    every param group (times the group's `lr_mult`, if any). A plugin with an attribute `moments` (`float32`,
    `bfloat16`) has the types of its optimizer's state audited."""
    raise NotImplementedError


# -- the run --------------------------------------------------------------------------------------


@hookspec
def ds_state() -> PluginState:
    """Event. What this plugin keeps from one process of a run to the next, in checkpoints.

    Asked once, before the first step; what it gives is checked then: an object with `version`, `save` and
    `load`, or None. What can be read again from `metrics.jsonl` needs no state.
    """
    raise NotImplementedError


@hookspec
def ds_model_built(plan: Plan, settings: Settings, chunks: Sequence[torch.nn.Module]) -> None:
    """Event. Look at what was built; don't change it."""
    raise NotImplementedError


@hookspec
def ds_grads_ready(step: int, chunks: Sequence[torch.nn.Module]) -> None:
    """Event. After gradient finalisation and bias updates, before the optimizer."""
    raise NotImplementedError


@hookspec
def ds_step_end(step: Step) -> Mapping[str, Any] | None:
    """Event. Called on every rank; what rank 0's listeners return is added to `metrics.jsonl`."""
    raise NotImplementedError


@hookspec
def ds_evaluated(evaluation: Evaluation) -> None:
    """Event. After each look at the validation split; on every rank."""
    raise NotImplementedError


@hookspec
def ds_run_end(end: RunEnd) -> Mapping[str, Any] | None:
    """Event. The run is over; called on rank 0 only. Returned entries are shown, paths of plots too."""
    raise NotImplementedError
