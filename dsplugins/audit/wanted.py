"""What each layer should be made of: the slots' answers, asked once more and read as classes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec

from dsplugins import model
from dsplugins.failures import HookFailure

if TYPE_CHECKING:
    from dsplugins.contracts import Plan, Settings
    from dsplugins.manager import Plugins


@dataclass(frozen=True)
class Wanted:
    """Classes, or None where an answer is a function and its product can't be known beforehand."""

    attention: ModuleSpec
    core_attention: type | None
    column: type | None
    """Column-parallel linear of the backend as the number format wraps it."""
    row: type | None
    norm: type
    router: type | None
    experts: type | None
    dispatcher: type | None
    dense_mlp: type
    shared_experts: type
    products: bool
    """Whether the number format brings products for packed experts."""
    unwrapped: tuple[type, ...]
    """The backend's own linears, where the number format put others in their place; else empty."""


def wanted(plan: Plan, settings: Settings, plugins: Plugins) -> Wanted:
    """Ask backend, precision, attention, router, experts and dispatcher.

    Raises HookFailure for a plugin that makes another class of the same name each time that it is asked.
    """
    config = settings.model
    parts = model.collect(plan, settings, plugins)
    bare = plugins.slot("backend", plan=plan, config=config)
    again = plugins.slot("backend", plan=plan, config=config)
    _steady(plugins, "backend", _classes(bare, config), _classes(again, config))
    twice = model.collect(plan, settings, plugins)
    _steady(plugins, "precision", _classes(parts.backend, config), _classes(twice.backend, config))
    for slot in ("attention", "router", "experts", "dispatcher"):
        _steady(plugins, slot, [class_of(getattr(parts, slot))], [class_of(getattr(twice, slot))])
    column, row = (class_of(linear) for linear in _linears(parts.backend))
    own = {class_of(linear) for linear in _linears(bare)} - {column, row}
    return Wanted(
        attention=parts.attention,
        core_attention=class_of(parts.backend.core_attention()),
        column=column,
        row=row,
        norm=norm_class(parts.backend.layer_norm(), config),
        router=class_of(parts.router),
        experts=class_of(parts.experts),
        dispatcher=class_of(parts.dispatcher),
        dense_mlp=model.dense_mlp_class(parts.backend),
        shared_experts=model.shared_expert_class(parts.backend),
        products=hasattr(parts.backend, "grouped_products"),
        unwrapped=tuple(linear for linear in own if linear is not None),
    )


def _classes(backend: Any, config: Any) -> list[type | None]:
    """What a backend's parts are made as; asked twice, both ought to be the same."""
    parts = [*_linears(backend), backend.core_attention()]
    return [*map(class_of, parts), norm_class(backend.layer_norm(), config)]


def _steady(plugins: Plugins, slot: str, once: list[type | None], again: list[type | None]) -> None:
    """Raise HookFailure where a class is another one each time: nobody could tell which one was chosen."""
    for first, second in zip(once, again, strict=True):
        if first is not None and second is not None and first is not second and _same_name(first, second):
            said = f"gave two classes {first.__name__}, another each time that it was asked: make it once"
            raise HookFailure(plugins.slots[slot], f"ds_{slot}", TypeError(f"{said} (functools.cache)"))


def _same_name(first: type, second: type) -> bool:
    return (first.__module__, first.__qualname__) == (second.__module__, second.__qualname__)


def _linears(backend: Any) -> tuple[Any, Any]:
    return backend.column_parallel_linear(), backend.row_parallel_linear()


def class_of(factory: Any) -> type | None:
    """The class that a slot's answer makes: itself, a partial's or a spec's; None for a function."""
    while isinstance(factory, partial | ModuleSpec):
        factory = factory.func if isinstance(factory, partial) else factory.module
    return factory if isinstance(factory, type) else None


def norm_class(factory: Any, config: Any) -> type:
    """The class of a norm that `factory` makes: a backend's may choose by `config.normalization`."""
    if factory in (None, IdentityOp):
        return IdentityOp
    with torch.device("meta"):
        made = factory(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)
    return type(made)
