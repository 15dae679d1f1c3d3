"""What megatron-core says when it refuses a configuration, as a problem with its key in the recipe."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from dsplugins.contracts import Problem

DERIVED_FROM = {
    "model.tensor_model_parallel_size": "parallel.tensor",
    "model.pipeline_model_parallel_size": "parallel.pipeline",
    "model.virtual_pipeline_model_parallel_size": "parallel.virtual_pipeline",
    "model.context_parallel_size": "parallel.context",
    "model.expert_model_parallel_size": "parallel.expert",
    "model.expert_tensor_parallel_size": "parallel.expert_tensor",
    "model.sequence_parallel": "parallel.tensor",
}
"""Megatron field that the layout gives -> the recipe's key for it."""
LIBRARY = re.compile(r"transformer-engine|install TE\b")
"""As megatron-core calls TransformerEngine where it misses it."""


def refusal(said: str, section: str, values: Mapping[str, Any], writers: Mapping[str, str]) -> Problem:
    """The problem of a message that may name fields of `section`, of which `values` are set.

    The key is the first field named that the recipe itself wrote; else what a derived field comes from, or
    the plugin that wrote one; else the section. Where megatron-core misses a library, nothing is wrong with
    the recipe: such a problem is one of the environment.
    """
    said = " ".join(said.split())
    problem = _placed(said, section, values, writers)
    if LIBRARY.search(said) and importlib.util.find_spec("transformer_engine") is None:
        remedy = "pip install 'dsplugins[te]' on a machine with CUDA"
        return replace(problem, remedy=remedy, kind="environment")
    return problem


def _placed(said: str, section: str, values: Mapping[str, Any], writers: Mapping[str, str]) -> Problem:
    named = [f"{section}.{field}" for field in _named(said, values)]
    keys = sorted(dict.fromkeys(_source(key, writers) for key in named), key=_distance)
    if not keys:
        return Problem(f"{section}: megatron-core refuses: {said}", section, "change the fields it names")
    others = f"; it names {', '.join(keys[1:])} too" if keys[1:] else ""
    key = keys[0]
    field = key.split(".", 1)[1]
    shown = f"={values[field]!r}" if key in named else ""
    return Problem(f"{key}{shown}: megatron-core refuses: {said}", key, f"change it{others}")


def _named(said: str, fields: Iterable[str]) -> list[str]:
    """Fields that a message names, in its order; spelled as text (`CPU offloading`) if none is by name."""
    words = re.findall(r"\w+", said)
    by_name = [word for word in dict.fromkeys(words) if word in fields]
    text = f"_{'_'.join(words).lower()}_"
    return by_name or sorted((f for f in fields if f"_{f}_" in text), key=lambda f: text.index(f"_{f}_"))


def _source(key: str, writers: Mapping[str, str]) -> str:
    """The recipe's key behind a Megatron field."""
    writer = writers.get(key, "")
    if writer.startswith("plugin "):
        return f"plugins.{writer.removeprefix('plugin ')}"
    return DERIVED_FROM.get(key, key) if writer == "derived" else key


def _distance(key: str) -> int:
    """How far a key is from what the recipe says of the model: its own field, the layout, a plugin."""
    return {"parallel": 1, "plugins": 2}.get(key.split(".")[0], 0)


__all__ = ["DERIVED_FROM", "refusal"]
