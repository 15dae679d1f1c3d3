"""What stands in each decoder and MTP layer, against what is wanted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.transformer_layer import TransformerLayer

from dsplugins.audit.wanted import Wanted, class_of, norm_class, wanted
from dsplugins.model import HostMoELayer, bare, moe_pattern

if TYPE_CHECKING:
    from dsplugins.audit.built import Standing

Differences = Iterable[tuple[str, str]]
"""(place, such as `decoder.3`; what is said of it)."""


def differences(run: Standing) -> Differences:
    """Everything that is not as the slots answered."""
    config, want = run.settings.model, wanted(run.plan, run.settings, run.plugins)
    for name, layer, moe in layers(config, run.chunks):
        for said in _layer(layer, moe, want, config):
            yield name, said
    for place, stands in _norms_outside(run.chunks):
        for said in differs("norm", stands, want.norm):
            yield place, said
    for chunk in map(bare, run.chunks):
        for name, block in _mtp(chunk):
            for said in differs("eh_proj", getattr(block, "eh_proj", None), want.column):
                yield name, said
    yield from _mocks(run.chunks)


def layers(config: Any, chunks: Sequence[torch.nn.Module]) -> Iterator[tuple[str, Any, bool]]:
    """(name, layer, whether it should have experts) of every decoder and MTP layer on this rank."""
    pattern = moe_pattern(config)
    for chunk in map(bare, chunks):
        for layer in chunk.decoder.layers:
            yield f"decoder.{layer.layer_number - 1}", layer, pattern[layer.layer_number - 1]
        for name, block in _mtp(chunk):
            yield name, block.mtp_model_layer, pattern[-1]


def _mtp(chunk: Any) -> Iterator[tuple[str, Any]]:
    mtp = getattr(chunk, "mtp", None)
    for depth, block in enumerate(mtp.layers if mtp is not None else ()):
        yield f"mtp.{depth}", block


def differs(slot: str, stands: Any, chosen: type | None) -> Iterator[str]:
    """Whether something else stands in a slot. A function there was never called by megatron-core."""
    if chosen is not None and type(stands) is not chosen:
        yield f"{slot} is {_apart(stands, chosen)}"
    elif chosen is None and (isinstance(stands, type) or not hasattr(stands, "forward")):
        yield f"{slot} is {_shown(stands)}, which is no module: megatron-core did not call it"


def _apart(stands: Any, chosen: type) -> str:
    """Both names, in full where they are alike."""
    own = type(stands)
    if own.__name__ != chosen.__name__:
        return f"{_shown(stands)}, chosen was {chosen.__name__}"
    first, second = (f"{one.__module__}.{one.__qualname__}" for one in (own, chosen))
    if first != second:
        return f"{first}, chosen was {second}"
    return (
        f"not the class {first} that was chosen but another one of that name: make it once (functools.cache)"
    )


def _shown(stands: Any) -> str:
    if isinstance(stands, type):
        return f"the class {stands.__name__}"
    return f"the function {stands.__name__}" if hasattr(stands, "__code__") else type(stands).__name__


def _layer(layer: Any, moe: bool, want: Wanted, config: Any) -> Iterator[str]:
    yield from differs("layer", layer, TransformerLayer)
    yield from differs("input norm", layer.input_layernorm, want.norm)
    yield from differs("pre-MLP norm", layer.pre_mlp_layernorm, want.norm)
    yield from _attention(layer.self_attention, want, config)
    if moe != isinstance(layer.mlp, HostMoELayer):
        yield f"mlp is {_shown(layer.mlp)}, chosen was {'experts' if moe else 'a dense MLP'}"
    elif moe:
        yield from _experts(layer.mlp, want, config)
    else:
        yield from differs("mlp", layer.mlp, want.dense_mlp)
        yield from _linears("mlp", layer.mlp, want)
    yield from _untouched(layer, want)


def _attention(attention: Any, want: Wanted, config: Any) -> Iterator[str]:
    """Core's resolver may replace a projection that is not identically the backend's own.

    An attention need not be made of submodules: one that computes scores itself names no `core_attention`.
    """
    yield from differs("attention", attention, class_of(want.attention))
    chosen = vars(want.attention.submodules) if want.attention.submodules is not None else {}
    if "core_attention" in chosen:
        stands = getattr(attention, "core_attention", None)
        yield from differs("core attention", stands, want.core_attention)
    for slot, factory in chosen.items():
        stands = getattr(attention, slot, None)
        if slot.startswith("linear_") and stands is not None:
            yield from differs(slot, stands, class_of(factory))
        elif slot.endswith("_layernorm"):
            asked = norm_class(factory, config)
            if stands is not None or asked is not IdentityOp:
                yield from differs(slot, stands, asked)


def _experts(mlp: Any, want: Wanted, config: Any) -> Iterator[str]:
    yield from differs("router", mlp.router, want.router)
    yield from differs("experts", mlp.experts, want.experts)
    if want.dispatcher is not None:
        yield from differs("dispatcher", mlp.token_dispatcher, want.dispatcher)
    if isinstance(mlp.experts, SequentialMLP):
        for expert in mlp.experts.local_experts:
            yield from _linears("experts", expert, want)
    shared = getattr(mlp, "shared_experts", None)
    if not config.moe_shared_expert_intermediate_size:
        if shared is not None:
            yield "shared experts stand there, moe_shared_expert_intermediate_size asks for none"
        return
    yield from differs("shared experts", shared, want.shared_experts)
    if isinstance(shared, SharedExpertMLP):
        yield from _linears("shared experts", shared, want)
    if (
        config.moe_shared_expert_overlap
        and getattr(mlp.token_dispatcher, "shared_experts", None) is not shared
    ):
        yield "moe_shared_expert_overlap: the dispatcher does not run the shared experts, so nobody does"


def _linears(slot: str, mlp: Any, want: Wanted) -> Iterator[str]:
    yield from differs(f"{slot} linear_fc1", mlp.linear_fc1, want.column)
    yield from differs(f"{slot} linear_fc2", mlp.linear_fc2, want.row)


def _untouched(layer: Any, want: Wanted) -> Iterator[str]:
    """Products that the number format should have wrapped and did not reach."""
    if not want.unwrapped:
        return
    for name, module in layer.named_modules():
        if type(module) in want.unwrapped:
            yield f"{name} is {type(module).__name__}: the number format has not reached it"
    experts = getattr(layer.mlp, "experts", None)
    reached = tuple(linear for linear in (want.column, want.row) if linear is not None)
    packed = want.products and hasattr(experts, "products")
    if experts is not None and not packed and not any(isinstance(m, reached) for m in experts.modules()):
        yield f"experts {type(experts).__name__} have no linears: the number format does not reach them"


def _norms_outside(chunks: Sequence[torch.nn.Module]) -> Iterator[tuple[str, Any]]:
    """Norms around the layers: the decoder's last and MTP's three."""
    for chunk in map(bare, chunks):
        final = getattr(chunk.decoder, "final_layernorm", None)
        if final is not None:
            yield "decoder.final_layernorm", final
        for name, block in _mtp(chunk):
            for slot in ("enorm", "hnorm", "final_layernorm"):
                if hasattr(block, slot):
                    yield f"{name}.{slot}", getattr(block, slot)


def _mocks(chunks: Sequence[torch.nn.Module]) -> Differences:
    for chunk in chunks:
        for name, module in chunk.named_modules():
            for key, value in vars(module).items():
                if isinstance(value, mock.NonCallableMock):
                    yield f"{name}.{key}", "is a mock: a library that megatron-core wants is not installed"
