"""What was built against what was chosen; a difference stops the run before the first step.

megatron-core ignores or replaces several wishes without a word (an unknown balance type, `fp8` without
transformer-engine, a fused projection put in place of a plugin's). The audit looks at the built modules,
never at the recipe's text alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest import mock

from dsplugins import optimizer_groups, routers
from dsplugins.model import HostMoELayer, bare, moe_pattern

if TYPE_CHECKING:
    import torch

    from dsplugins.contracts import Plan, Settings
    from dsplugins.manager import Plugins


class AuditFailure(RuntimeError):
    """The built model is not the chosen one; lists every difference."""

    def __init__(self, differences: Sequence[str]) -> None:
        self.differences = tuple(differences)
        super().__init__("what was built is not what was chosen: " + "; ".join(differences))


def audit(
    plan: Plan, settings: Settings, plugins: Plugins, chunks: Sequence[torch.nn.Module], optimizer: Any
) -> None:
    """Raise AuditFailure with every difference found on this rank."""
    config = settings.model
    found = [*_mocks(chunks), *_numbers(config), *_optimizer(optimizer, chunks)]
    reference = _reference(settings, plugins)
    for name, layer, moe in layers(config, chunks):
        found += (f"{name}: {said}" for said in _layer(layer, moe, reference))
    found += _counts(config, chunks)
    if found:
        raise AuditFailure(found)


def layers(config: Any, chunks: Sequence[torch.nn.Module]) -> Iterable[tuple[str, Any, bool]]:
    """(name, layer, whether it should have experts) of every decoder and MTP layer on this rank."""
    pattern = moe_pattern(config)
    for chunk in map(bare, chunks):
        for layer in chunk.decoder.layers:
            yield f"decoder.{layer.layer_number - 1}", layer, pattern[layer.layer_number - 1]
        for depth, layer in enumerate(chunk.mtp.layers if getattr(chunk, "mtp", None) is not None else ()):
            yield f"mtp.{depth}", layer.mtp_model_layer, pattern[-1]


def _reference(settings: Settings, plugins: Plugins) -> dict[str, Any]:
    """The slots' answers, asked once more: what each layer should be made of."""
    from dsplugins.model import collect

    parts = collect(settings, plugins)
    return vars(parts)


def _layer(layer: Any, moe: bool, reference: dict[str, Any]) -> Iterable[str]:
    wanted = reference["attention"].module
    if type(layer.self_attention) is not wanted:
        yield f"attention is {type(layer.self_attention).__name__}, chosen was {wanted.__name__}"
    core = reference["backend"].core_attention()
    if isinstance(core, type) and type(layer.self_attention.core_attention) is not core:
        stands = type(layer.self_attention.core_attention).__name__
        yield f"core attention is {stands}, chosen was {core.__name__}"
    yield from _projections(layer.self_attention, reference["attention"].submodules)
    if moe != isinstance(layer.mlp, HostMoELayer):
        yield f"mlp is {type(layer.mlp).__name__}, chosen was {'experts' if moe else 'a dense MLP'}"
    elif moe:
        for slot, stands in (
            ("router", layer.mlp.router),
            ("experts", layer.mlp.experts),
            ("dispatcher", layer.mlp.token_dispatcher),
        ):
            yield from _made_by(slot, reference[slot], stands)


def _made_by(slot: str, factory: Any, stands: Any) -> Iterable[str]:
    """Whether a slot's factory, a class or a partial of one, made what stands there."""
    while isinstance(factory, partial):
        factory = factory.func
    if isinstance(factory, type) and type(stands) is not factory:
        yield f"{slot} is {type(stands).__name__}, chosen was {factory.__name__}"


def _projections(attention: Any, submodules: Any) -> Iterable[str]:
    """Core's resolver may replace an up-projection that is not identically the backend's own."""
    for name in vars(submodules) if submodules is not None else ():
        wanted, built = getattr(submodules, name), getattr(attention, name, None)
        if (
            name.startswith("linear_")
            and isinstance(wanted, type)
            and built is not None
            and type(built) is not wanted
        ):
            yield f"{name} is {type(built).__name__}, chosen was {wanted.__name__}"


def _mocks(chunks: Sequence[torch.nn.Module]) -> Iterable[str]:
    for chunk in chunks:
        for name, module in chunk.named_modules():
            for key, value in vars(module).items():
                if isinstance(value, mock.NonCallableMock):
                    yield f"{name}.{key} is a mock: a library that megatron-core wants is not installed"


def _numbers(config: Any) -> Iterable[str]:
    known = {"aux_loss", "seq_aux_loss", "global_aux_loss", "sinkhorn", "quantile_balancing", "none"}
    kinds = config.moe_router_load_balancing_type
    for kind in [kinds] if isinstance(kinds, str) else kinds:
        if kind not in known:
            yield f"moe_router_load_balancing_type {kind!r} is unknown: megatron-core would balance nothing"
    if config.fp8 or config.fp4:
        try:
            import transformer_engine  # noqa: F401
        except ImportError:
            yield "fp8 is set, transformer-engine is absent: megatron-core would train in 16 bits, silently"
    if config.moe_router_enable_expert_bias:
        yield "moe_router_enable_expert_bias is set: biases would be updated twice"


def _counts(config: Any, chunks: Sequence[torch.nn.Module]) -> Iterable[str]:
    for name, router in routers.local(chunks):
        counts = getattr(router, "local_tokens_per_expert", None)
        if counts is None or tuple(counts.shape) != (config.num_moe_experts,):
            yield f"{name}: router {type(router).__name__} keeps no local_tokens_per_expert [E]"
    for chunk in map(bare, chunks):
        if config.mtp_num_layers and chunk.mtp_process and getattr(chunk, "mtp", None) is None:
            yield "mtp_num_layers is set but no MTP block was built"


def _optimizer(optimizer: Any, chunks: Sequence[torch.nn.Module]) -> Iterable[str]:
    yield from (f"optimizer: {said}" for said in optimizer_groups.miscounted(optimizer, chunks))
