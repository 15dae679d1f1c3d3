"""Recipe + chosen plugins -> Plan: the run's frozen description, with its sizes checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from dsplugins.contracts import (
    DataOptions,
    Evaluate,
    Layout,
    Plan,
    Problem,
    Range,
    RecipeError,
    RunOptions,
    Save,
    Train,
)
from dsplugins.manager import Plugins, choose
from dsplugins.typed import build

if TYPE_CHECKING:
    from dsplugins.recipe import Recipe

Size = Annotated[int, Range(1)]


@dataclass(frozen=True)
class Parallel:
    """`parallel:` of a recipe, the only short names in it."""

    tensor: Size = 1
    """Megatron's tensor_model_parallel_size; sequence parallel comes with it."""
    pipeline: Size = 1
    """Megatron's pipeline_model_parallel_size."""
    virtual_pipeline: Size = 1
    """Model chunks a rank holds; more than one needs an interleaved schedule."""
    expert: Size = 1
    """Megatron's expert_model_parallel_size."""
    expert_tensor: Size = 1
    """Megatron's expert_tensor_parallel_size."""
    context: Size = 1
    """Megatron's context_parallel_size."""


def prepare(recipe: Recipe) -> tuple[Plugins, Plan]:
    """The plugins that a recipe names and its plan; imports neither torch nor megatron-core.

    Raises RecipeError with every problem that can be found so: the text, the plugins, the typed
    sections, the sizes.
    """
    problems = list(recipe.problems)
    plugins: Plugins | None = None
    try:
        plugins = choose(recipe)
    except RecipeError as error:
        problems += error.problems
    plan = _plan(recipe, plugins, problems)
    if plan:
        problems += [*_needed(plan), *_length(plan), *_layout(plan), *_batches(plan)]
    if problems or plugins is None or plan is None:
        raise RecipeError(recipe.located(problems))
    return plugins, plan


def _plan(recipe: Recipe, plugins: Plugins | None, problems: list[Problem]) -> Plan | None:
    """The plan, or None when a section is wrong; adds to `problems`."""
    kinds = {
        "parallel": Parallel,
        "data": DataOptions,
        "train": Train,
        "evaluate": Evaluate,
        "save": Save,
        "run": RunOptions,
    }
    parts = {name: _section(recipe, name, cls, problems) for name, cls in kinds.items()}
    if any(part is None for part in parts.values()):
        return None
    run, parallel = parts["run"], parts["parallel"]
    return Plan(
        name=recipe.name,
        model=dict(recipe.sections["model"]),
        optimizer=dict(recipe.sections["optimizer"]),
        ddp=dict(recipe.sections["ddp"]),
        layout=Layout(world_size=run.world_size, **vars(parallel)),
        data=parts["data"],
        train=parts["train"],
        evaluate=parts["evaluate"],
        save=parts["save"],
        run=replace(run, directory=_filled(run, recipe)),
        plugins=tuple(item.name for item in plugins or ()),
        slots=plugins.slots if plugins else {},
    )


def run_directory(recipe: Recipe) -> Path | None:
    """Where a recipe's run is kept, known also when the recipe is refused; None if `run:` itself is wrong."""
    run = _section(recipe, "run", RunOptions, [])
    return Path(_filled(run, recipe)) if run else None


def _filled(run: RunOptions, recipe: Recipe) -> str:
    return run.directory.replace("{recipe}", recipe.name)


def _section(recipe: Recipe, name: str, cls: type, problems: list[Problem]) -> Any:
    values: Mapping[str, Any] = recipe.sections.get(name, {})
    built, faults = build(cls, values, name, f"`{name}:`")
    problems += faults
    return built


def _needed(plan: Plan) -> Iterable[Problem]:
    for field in ("vocab_size", "num_layers", "hidden_size", "num_attention_heads"):
        value = plan.model.get(field)
        if not isinstance(value, int) or value < 1:
            yield Problem(
                f"model.{field} is missing or not a positive whole number", f"model.{field}", "set it"
            )


def _length(plan: Plan) -> Iterable[Problem]:
    train = plan.train
    if (train.steps is None) == (train.tokens is None):
        yield Problem("train needs `steps` or `tokens`, one of them", "train", "drop one: `tokens: null`")
    for name, value in (("steps", train.steps), ("tokens", train.tokens)):
        if value is not None and value <= 0:
            yield Problem(f"train.{name}={value} is not positive", f"train.{name}", "give a positive number")
    at_least = {
        "train.micro_batch": (train.micro_batch, 1),
        "train.log_every": (train.log_every, 1),
        "evaluate.every": (plan.evaluate.every, 0),
        "evaluate.sequences": (plan.evaluate.sequences, 0),
        "save.every": (plan.save.every, 0),
        "save.minutes": (plan.save.minutes, 0),
        "save.keep": (plan.save.keep, 1),
        "save.keep_every": (plan.save.keep_every, 0),
    }
    for key, (number, least) in at_least.items():
        if number < least:
            yield Problem(f"{key}={number} is less than {least}", key, f"give {least} or more")


def _divides(small: int, small_key: str, large: Any, large_key: str) -> Iterable[Problem]:
    if isinstance(large, int) and small > 1 and large % small:
        said = f"{small_key}={small} does not divide {large_key}={large}"
        yield Problem(said, small_key, f"choose a divisor of {large}")


def _layout(plan: Plan) -> Iterable[Problem]:
    layout, model = plan.layout, plan.model
    world, world_key = layout.world_size, "run.world_size"
    if world < 1:
        yield Problem(f"run.world_size={world} is less than 1", world_key, "give the number of processes")
        return
    dense = layout.model_parallel
    if world % dense:
        said = f"run.world_size={world} is not a multiple of tensor x pipeline x context = {dense}"
        yield Problem(said, world_key, f"use a multiple of {dense}, or change parallel:")
    sparse = layout.expert * layout.expert_tensor * layout.pipeline
    if world % sparse:
        said = f"run.world_size={world} is not a multiple of expert x expert_tensor x pipeline = {sparse}"
        yield Problem(said, "parallel.expert", f"use a multiple of {sparse}, or change parallel:")
    yield from _divides(
        layout.expert, "parallel.expert", model.get("num_moe_experts"), "model.num_moe_experts"
    )
    for field in ("num_attention_heads", "num_query_groups", "vocab_size"):
        yield from _divides(layout.tensor, "parallel.tensor", model.get(field), f"model.{field}")
    yield from _divides(
        layout.tensor * layout.context, "parallel.tensor", plan.data.seq_length, "data.seq_length"
    )
    if layout.expert > 1 and not model.get("num_moe_experts"):
        yield Problem("parallel.expert > 1 but the model has no experts", "parallel.expert", "set it to 1")
    if layout.virtual_pipeline > 1 and layout.pipeline == 1:
        said = f"parallel.virtual_pipeline={layout.virtual_pipeline} needs parallel.pipeline > 1"
        yield Problem(said, "parallel.virtual_pipeline", "set it to 1")
    if not model.get("pipeline_model_parallel_layout"):
        stages = layout.pipeline * layout.virtual_pipeline
        if isinstance(model.get("num_layers"), int) and model["num_layers"] % stages:
            layers = model["num_layers"]
            said = f"pipeline x virtual_pipeline = {stages} does not divide model.num_layers={layers}"
            remedy = "choose a divisor, or place layers with model.pipeline_model_parallel_layout"
            yield Problem(said, "parallel.pipeline", remedy)


def _batches(plan: Plan) -> Iterable[Problem]:
    unit = plan.train.micro_batch * plan.layout.data
    if unit < 1:
        return
    batch = plan.train.global_batch
    if batch.is_constant and batch.at(0, 0) % unit:
        said = (
            f"train.global_batch={batch.at(0, 0):g} is not a multiple of micro_batch x data parallel = {unit}"
        )
        yield Problem(said, "train.global_batch", f"use a multiple of {unit}")
    elif not batch.is_constant and batch.at(0, 0) < unit:
        said = f"train.global_batch starts at {batch.at(0, 0):g}, below micro_batch x data parallel = {unit}"
        yield Problem(said, "train.global_batch", f"start at {unit} or more")
    sequences = plan.evaluate.sequences
    if sequences % unit:
        said = f"evaluate.sequences={sequences} is not a multiple of micro_batch x data parallel = {unit}"
        yield Problem(said, "evaluate.sequences", f"use a multiple of {unit}, or 0")


__all__ = ["Parallel", "prepare", "run_directory"]
