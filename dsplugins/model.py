"""Slots -> specs -> this rank's model chunks; decoder and MTP are made from the same choice."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from dsplugins import gradient_buffers, placement, weights
from dsplugins.failures import HookFailure, PluginFailure

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from dsplugins.contracts import DispatcherFactory, ExpertsFactory, Layout, Plan, RouterFactory, Settings
    from dsplugins.manager import Plugins


class HostMoELayer(MoELayer):
    """megatron-core's MoE layer with the dispatcher of the dispatcher slot.

    Core picks its dispatcher by name and has no seam for another one, so it is replaced right after
    construction, before anything has used it.
    """

    def __init__(self, *args: Any, dispatcher: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        groups = kwargs.get("pg_collection")
        if groups is None:
            from megatron.core.process_groups_config import ProcessGroupCollection

            groups = ProcessGroupCollection.use_mpu_process_groups()
        self.token_dispatcher = dispatcher(
            self.num_local_experts, self.local_expert_indices, config=self.config, pg_collection=groups
        )


FACTORIES: dict[str, type] = {
    "model": torch.nn.Module,
    "router": torch.nn.Module,
    "experts": torch.nn.Module,
    "dispatcher": MoETokenDispatcher,
}
"""Slot whose part is a factory -> what that makes."""


@dataclass(frozen=True)
class Parts:
    """What the slots gave for one model."""

    backend: Any
    attention: ModuleSpec
    router: RouterFactory | None
    experts: ExpertsFactory | None
    dispatcher: DispatcherFactory | None
    owners: Mapping[str, str]
    """Slot -> name of the plugin that gave its part."""


def collect(plan: Plan, settings: Settings, plugins: Plugins) -> Parts:
    """Ask the slots, from the inside out. Raises HookFailure for what can't be one."""
    ask = partial(plugins.slot, plan=plan, config=settings.model)
    backend = ask("precision", backend=ask("backend"))
    moe = settings.model.num_moe_experts is not None
    return Parts(
        backend=backend,
        attention=ask("attention", backend=backend),
        router=ask("router") if moe else None,
        experts=ask("experts", backend=backend) if moe else None,
        dispatcher=ask("dispatcher") if moe else None,
        owners=plugins.slots,
    )


def _making(factory: Callable[..., Any], slot: str, owner: str) -> Callable[..., Any]:
    """The factory of a slot; what it makes is looked at, before megatron-core stumbles over it."""

    def make(*args: Any, **kwargs: Any) -> Any:
        try:
            made = factory(*args, **kwargs)
        except TypeError as error:
            assert error.__traceback__ is not None
            if error.__traceback__.tb_next is not None:
                raise  # from the inside: whose code it is, its traceback tells
            raise PluginFailure(f"plugin {owner} failed in ds_{slot}: its factory: {error}") from error
        if not isinstance(made, FACTORIES[slot]):
            got = f"its factory made {type(made).__name__}, not a {FACTORIES[slot].__name__}"
            raise PluginFailure(f"plugin {owner} failed in ds_{slot}: {got}")
        return made

    return make


def _constructible(parts: Parts) -> None:
    """Whether the attention's class takes what megatron-core makes it with. Raises HookFailure."""
    spec = parts.attention
    if not isinstance(spec.module, type):
        return  # a path, which megatron-core imports
    given = dict.fromkeys(("config", "layer_number", "pg_collection", "name"))
    given |= spec.params | ({} if spec.submodules is None else {"submodules": spec.submodules})
    try:
        inspect.signature(spec.module).bind(**given)
    except TypeError as error:
        said = TypeError(f"{spec.module.__name__}(): {error}; it is made with {', '.join(given)}")
        raise HookFailure(parts.owners["attention"], "ds_attention", said) from error


def layer_spec(parts: Parts, moe: bool) -> ModuleSpec:
    """One decoder layer: norm, attention, norm, and a dense MLP or a mixture of experts."""
    norm = parts.backend.layer_norm()
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=parts.attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=_moe(parts) if moe else _dense(parts),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _mlp_submodules(parts: Parts) -> MLPSubmodules:
    return MLPSubmodules(
        linear_fc1=parts.backend.column_parallel_linear(),
        linear_fc2=parts.backend.row_parallel_linear(),
        activation_func=parts.backend.activation_func(),
    )


def shared_expert_class(backend: Any) -> type[SharedExpertMLP]:
    """Core's, or the one that the number format brings."""
    brought = getattr(backend, "shared_expert_mlp", None)
    return SharedExpertMLP if brought is None else brought()


def dense_mlp_class(backend: Any) -> type[MLP]:
    """Core's, or the one that the number format brings."""
    brought = getattr(backend, "dense_mlp", None)
    return MLP if brought is None else brought()


def _dense(parts: Parts) -> Any:
    mlp = dense_mlp_class(parts.backend)
    return partial(mlp.as_mlp_submodule, submodules=_mlp_submodules(parts))


def _moe(parts: Parts) -> Any:
    shared: Any = shared_expert_class(parts.backend)

    def make(slot: str) -> Callable[..., Any]:
        return _making(getattr(parts, slot), slot, parts.owners[slot])

    return partial(
        HostMoELayer,
        submodules=MoESubmodules(
            experts=make("experts"),
            shared_experts=partial(shared, submodules=_mlp_submodules(parts)),
            router=make("router"),
        ),
        dispatcher=make("dispatcher"),
    )


def moe_pattern(config: Any) -> list[bool]:
    """For each decoder layer, whether it has experts (`moe_layer_freq`, an int or a list)."""
    if config.num_moe_experts is None:
        return [False] * config.num_layers
    frequency = config.moe_layer_freq
    if isinstance(frequency, int):
        return [i % frequency == 0 for i in range(config.num_layers)]
    assert len(frequency) == config.num_layers, f"moe_layer_freq has {len(frequency)} entries"
    return [bool(x) for x in frequency]


def whole_decoder(config: Any, parts: Parts) -> TransformerBlockSubmodules:
    """Specs of all layers of the model, whatever stage they stand on."""
    dense, moe = layer_spec(parts, moe=False), layer_spec(parts, moe=True) if parts.router else None
    specs = [moe if is_moe else dense for is_moe in moe_pattern(config)]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=parts.backend.layer_norm())


def _slice(
    config: Any, whole: TransformerBlockSubmodules, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """The layers of this rank's chunk `vp_stage`, as core's own block spec slices them."""
    layout = config.pipeline_model_parallel_layout
    if layout is not None:
        from megatron.core.transformer.enums import LayerType

        ids = layout.get_layer_id_list(layer_type=LayerType.decoder, vp_stage=vp_stage)
    else:
        offset = get_transformer_layer_offset(config, vp_stage=vp_stage)
        ids = range(offset, offset + get_num_layers_to_build(config, vp_stage=vp_stage))
    return TransformerBlockSubmodules(
        layer_specs=[whole.layer_specs[i] for i in ids], layer_norm=whole.layer_norm
    )


def start_groups(layout: Layout, seed: int, placed: Any = None, timeout_minutes: float = 30.0) -> None:
    """Make megatron-core's process groups and seed its random states.

    `placed` is the configuration's `pipeline_model_parallel_layout`, if any.
    """
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
        create_gloo_process_groups=False,
        get_embedding_ranks=None if placed is None else placement.embedding_ranks(placed),
        distributed_timeout_minutes=timeout_minutes,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def build_chunks(plan: Plan, settings: Settings, plugins: Plugins) -> list[torch.nn.Module]:
    """This rank's bare model chunks, in order, with recompute attached; weights not yet initialised."""
    ask = partial(plugins.slot, plan=plan, config=settings.model)
    parts = collect(plan, settings, plugins)
    _constructible(parts)
    whole = whole_decoder(settings.model, parts)
    factory = _making(plugins.slot("model", plan=plan, settings=settings), "model", plugins.slots["model"])
    mtp = partial(ask, "mtp", decoder=whole, backend=parts.backend) if plugins.owner("mtp") else None
    several = plan.layout.virtual_pipeline > 1
    chunks = [
        _chunk(settings.model, whole, mtp, factory, chunk if several else None)
        for chunk in range(plan.layout.virtual_pipeline)
    ]
    if plugins.owner("recompute"):
        for module in chunks:
            ask("recompute", chunk=module)
    return chunks


def _chunk(
    config: Any,
    whole: TransformerBlockSubmodules,
    mtp: Callable[[], ModuleSpec] | None,
    factory: Callable[..., torch.nn.Module],
    vp_stage: int | None,
) -> torch.nn.Module:
    """Chunk `vp_stage` of this rank, with MTP's block where that stands."""
    from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank

    predicts = mtp is not None and mtp_on_this_rank(
        layout=config.pipeline_model_parallel_layout,
        mtp_num_layers=config.mtp_num_layers,
        ignore_virtual=False,
        vp_stage=vp_stage,
    )
    model: Any = factory(
        decoder=_slice(config, whole, vp_stage),
        mtp=mtp() if mtp is not None and predicts else None,
        pre_process=placement.embeds(config, vp_stage),
        post_process=placement.has_head(config, vp_stage),
        vp_stage=vp_stage,
    )
    model.model_type = getattr(model, "model_type", None)
    return model


def wrap(chunks: list[torch.nn.Module], settings: Settings) -> list[torch.nn.Module]:
    """Chunks in megatron-core's half-precision module (if bf16) and data-parallel wrapper."""
    halves = halved(chunks, settings)
    return [data_parallel(chunk, settings, first=index == 0) for index, chunk in enumerate(halves)]


def halved(chunks: list[torch.nn.Module], settings: Settings) -> list[torch.nn.Module]:
    """Chunks in megatron-core's half-precision module, where the format is one."""
    config = settings.model
    return [Float16Module(config, chunk) for chunk in chunks] if config.bf16 or config.fp16 else chunks


def data_parallel(chunk: torch.nn.Module, settings: Settings, first: bool = True) -> torch.nn.Module:
    """Core's wrapper of a rank's `first` chunk or another, with experts in its buffers in one order."""
    shares = (
        parallel_state.get_data_parallel_world_size(with_context_parallel=True, partial_data_parallel=True),
        parallel_state.get_expert_data_parallel_world_size(partial_expert_data_parallel=True),
    )
    bucket = gradient_buffers.bucket_size(
        settings.ddp,
        parallel_state.get_data_parallel_world_size(),
        first_chunk=first,
        first_stage=parallel_state.is_pipeline_first_stage(ignore_virtual=True),
    )
    return DistributedDataParallel(
        config=settings.model,
        ddp_config=settings.ddp,
        module=chunk,
        disable_bucketing=not first,
        full_param_layout=gradient_buffers.layout(chunk, settings.ddp, bucket, *shares),
    )


def build(
    plan: Plan, settings: Settings, plugins: Plugins, device: torch.device, to_train: bool = True
) -> list[torch.nn.Module]:
    """Built, initialised, on their device, wrapped: what the loop trains, or what is only looked through."""
    chunks = [chunk.to(device) for chunk in build_chunks(plan, settings, plugins)]
    weights.initialise(chunks, plan.train.seed, settings.model.init_method_std, plan.train.twin)
    return wrap(chunks, settings) if to_train else halved(chunks, settings)


@torch.no_grad()
def gather_weights(chunks: Sequence[Any]) -> None:
    """Bring each rank's updated share of the weights to all; collective.

    To be called before weights are read other than by a forward pass: with `overlap_param_gather` the shares
    of other ranks are those of the step before until the next forward pass asks for them.
    """
    for chunk in chunks:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def bare(chunk: Any) -> Any:
    """The model chunk inside its wrappers."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk
