"""megatron-core's configuration: what it holds against what was asked, and what it can do here."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from dsplugins.audit.ignored import ignored
from dsplugins.schedules import Schedule
from dsplugins.settings import SECTIONS, ledger

if TYPE_CHECKING:
    from dsplugins.audit.built import Standing


def differences(run: Standing) -> Iterable[str]:
    """Fields that were changed or have no effect, and formats without the library behind them."""
    yield from held(run)
    yield from (said for _, said in ignored(run.settings, run.plan.slots))
    yield from _formats(run.settings.model)


def held(run: Standing) -> Iterable[str]:
    """Values that megatron-core's own checks replaced. Needs nothing built."""
    for key, asked in ledger(run.plan, run.plugins).values.items():
        section, field = key.split(".", 1)
        if section not in SECTIONS or isinstance(asked, str) or key == "model.vocab_size":
            continue  # words may stand for objects: an activation, a layout
        if isinstance(asked, Schedule):
            if not asked.is_constant:
                continue  # it moves in each step
            asked = asked.at(0, 0)
        held = getattr(getattr(run.settings, section), field)
        if _plain(held) != _plain(asked):
            yield f"{key} was to be {asked!r}, megatron-core holds {held!r}"


def _plain(value: Any) -> Any:
    """As values can be compared: core turns a list into a layout, and two of those are never equal."""
    if isinstance(value, PipelineParallelLayerLayout):
        return value.input_data
    return list(value) if isinstance(value, tuple) else value


def _formats(config: Any) -> Iterable[str]:
    if importlib.util.find_spec("transformer_engine") is not None:
        return
    for field in ("fp8", "fp4", "quant_recipe"):
        if getattr(config, field):
            yield f"{field} is set, transformer-engine is absent: megatron-core would train in 16 bits"
