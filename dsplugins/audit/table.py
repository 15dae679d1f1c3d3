"""What was built, one line for each kind of layer: for people and for the run's directory."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from megatron.core import parallel_state

from dsplugins.audit.layers import layers


@dataclass(frozen=True)
class Kind:
    """Class names of layers that are made alike; "" where a layer has no such part."""

    layers: str
    """Which ones: `decoder.3-60`; decoder and MTP layers are counted from 0."""
    attention: str
    core_attention: str
    linears: str
    """All linears of attention and MLP, experts too."""
    norms: str
    mlp: str
    router: str
    experts: str
    shared_experts: str
    dispatcher: str
    dtype: str
    """Of the layer's parameters."""


def describe(config: Any, chunks: Sequence[torch.nn.Module]) -> list[Kind]:
    """Kinds of decoder and MTP layers on this rank, in order."""
    return _merged((name, _kind(layer)) for name, layer, _ in layers(config, chunks))


def describe_run(config: Any, chunks: Sequence[torch.nn.Module]) -> list[Kind]:
    """Kinds of all stages of this rank's pipeline, the same on each of them. Collective."""
    mine = [(name, _kind(layer)) for name, layer, _ in layers(config, chunks)]
    group = parallel_state.get_pipeline_model_parallel_group()
    stages: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(stages, mine, group=group)
    return _merged(sorted((item for stage in stages for item in stage), key=lambda item: _order(item[0])))


def span(names: Iterable[str]) -> str:
    """`decoder.0`, `decoder.1`, `decoder.2`, `mtp.0` as `decoder.0-2, mtp.0`; other names as they are."""
    shown = []
    for head, members in groupby(dict.fromkeys(names), key=lambda name: _order(name)[0]):
        numbers = [_order(name)[1] for name in members]
        if numbers == [-1]:
            shown.append(head)
            continue
        for _, run in groupby(enumerate(sorted(numbers)), key=lambda pair: pair[1] - pair[0]):
            first, *rest = [number for _, number in run]
            shown.append(f"{head}.{first}" + (f"-{rest[-1]}" if rest else ""))
    return ", ".join(shown)


def _order(name: str) -> tuple[str, int]:
    found = re.fullmatch(r"(decoder|mtp)\.(\d+)", name)
    return (found[1], int(found[2])) if found else (name, -1)


def _merged(kinds: Iterable[tuple[str, Kind]]) -> list[Kind]:
    names: dict[Kind, list[str]] = {}
    for name, kind in kinds:
        names.setdefault(kind, []).append(name)
    return [replace(kind, layers=span(members)) for kind, members in names.items()]


def _kind(layer: Any) -> Kind:
    attention, mlp = layer.self_attention, layer.mlp
    named = list(layer.named_modules())
    return Kind(
        layers="",
        attention=_name(attention),
        core_attention=_name(getattr(attention, "core_attention", None)),
        linears=_names(module for name, module in named if _last(name).startswith("linear_")),
        norms=_names(module for name, module in named if _last(name).endswith("layernorm")),
        mlp=_name(mlp),
        router=_name(getattr(mlp, "router", None)),
        experts=_name(getattr(mlp, "experts", None)),
        shared_experts=_name(getattr(mlp, "shared_experts", None)),
        dispatcher=_name(getattr(mlp, "token_dispatcher", None)),
        dtype=" ".join(sorted({str(p.dtype).removeprefix("torch.") for p in layer.parameters()})),
    )


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _name(part: Any) -> str:
    return "" if part is None else type(part).__name__


def _names(parts: Iterable[Any]) -> str:
    return " ".join(sorted({_name(part) for part in parts} - {"IdentityOp"}))
