"""Recipe + chosen plugins -> Plan: the run's frozen description, with its sizes checked."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
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
from dsplugins.megatron_fields import unknown_fields
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


SECTIONS = {
    "parallel": Parallel,
    "data": DataOptions,
    "train": Train,
    "evaluate": Evaluate,
    "save": Save,
    "run": RunOptions,
}
"""Sections with dataclasses of ours."""


def prepare(recipe: Recipe) -> tuple[Plugins, Plan]:
    """The plugins that a recipe names and its plan; imports neither torch nor megatron-core.

    Raises RecipeError with every problem that can be found so, see `survey`.
    """
    plugins, plan, problems = survey(recipe)
    if problems or plugins is None or plan is None:
        raise RecipeError(recipe.located(problems))
    return plugins, plan


def survey(recipe: Recipe) -> tuple[Plugins | None, Plan | None, list[Problem]]:
    """The plugins, the plan, and every problem of the text, the plugins, the sections and the sizes.

    No plugins where a plugin is at fault; no plan where a value doesn't fit its section.
    """
    problems: list[Problem] = []
    plugins: Plugins | None = None
    try:
        plugins = choose(recipe)
    except RecipeError as error:
        problems += error.problems
    problems += unknown_fields(recipe.sections)
    parts = {name: _section(recipe, name, cls) for name, cls in SECTIONS.items()}
    problems += [problem for _, faults in parts.values() for problem in faults]
    plan = _plan(recipe, plugins, {name: part for name, (part, _) in parts.items()})
    told = {problem.key for problem in recipe.problems}
    unsound = {name for name, (_, faults) in parts.items() if faults} | {key.split(".")[0] for key in told}
    for check, sections in CHECKS:
        if plan and not unsound.intersection(sections):
            problems += check(plan)
    found = [*recipe.problems, *(problem for problem in problems if not _follows(problem.key, told))]
    return plugins, None if unsound.intersection(SECTIONS) else plan, found


def _follows(key: str, told: Collection[str]) -> bool:
    """Whether a fault at `key` comes from one in the text, of the same key or one above or below it."""
    if key == "plugins":  # about slots, not about what stands in there
        return False
    return any(bad and (f"{key}.".startswith(f"{bad}.") or bad.startswith(f"{key}.")) for bad in told)


def _plan(recipe: Recipe, plugins: Plugins | None, parts: Mapping[str, Any]) -> Plan | None:
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
    run, faults = _section(recipe, "run", RunOptions)
    return None if faults else Path(_filled(run, recipe))


def _filled(run: RunOptions, recipe: Recipe) -> str:
    return run.directory.replace("{recipe}", recipe.name)


def _section(recipe: Recipe, name: str, cls: type) -> tuple[Any, list[Problem]]:
    """A section as its dataclass, and what is wrong with it; it is made of the values that fit."""
    values: Mapping[str, Any] = recipe.sections.get(name, {})
    built, faults = build(cls, values, name, f"`{name}:`")
    if faults:
        bad = {problem.key for problem in faults}
        built, _ = build(cls, {k: v for k, v in values.items() if f"{name}.{k}" not in bad}, name, "")
    return built, faults


def _sizes(plan: Plan) -> Iterable[Problem]:
    """What every model needs, and numbers that megatron-core would divide by, or build nothing from."""
    for field in ("vocab_size", "num_layers", "hidden_size", "num_attention_heads"):
        value = plan.model.get(field)
        if value is None:
            yield Problem(f"model.{field} is missing", f"model.{field}", "give a positive whole number")
        elif not isinstance(value, int) or value < 1:
            said = f"model.{field}={value!r} is not a positive whole number"
            yield Problem(said, f"model.{field}", "give one, without quotes")
    for field in COUNTS:
        value = plan.model.get(field)
        if isinstance(value, int) and value < 1:
            yield Problem(f"model.{field}={value} is less than 1", f"model.{field}", "give 1 or more")
    for field in POSITIVE:
        value = plan.model.get(field)
        if isinstance(value, int | float) and value <= 0:
            yield Problem(f"model.{field}={value:g} is not positive", f"model.{field}", "give more than 0")


COUNTS = (
    *("ffn_hidden_size", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size", "moe_router_topk"),
    *("moe_router_num_groups", "moe_router_group_topk", "q_lora_rank", "kv_lora_rank", "qk_head_dim"),
    *("qk_pos_emb_head_dim", "v_head_dim", "kv_channels", "num_query_groups", "mtp_num_layers"),
    *("max_position_embeddings", "original_max_position_embeddings"),
)
"""Fields of `model:` that are 1 or more, where they are there."""
POSITIVE = ("init_method_std", "layernorm_epsilon", "rotary_base", "rotary_scaling_factor", "rotary_percent")
"""Fields that are more than 0."""


def _length(plan: Plan) -> Iterable[Problem]:
    train = plan.train
    if (train.steps is None) == (train.tokens is None):
        remedy = "give one of them" if train.steps is None else "drop one: `tokens: null`"
        yield Problem("train needs `steps` or `tokens`, one of them", "train", remedy)
    for name, value in (("steps", train.steps), ("tokens", train.tokens)):
        if value is not None and value <= 0:
            yield Problem(f"train.{name}={value} is not positive", f"train.{name}", "give a positive number")
    at_least = {
        "data.seq_length": (plan.data.seq_length, 1),
        "train.seed": (train.seed, 0),
        "train.learning_rate": (train.learning_rate.lowest, 0),
        "train.global_batch": (train.global_batch.lowest, 1),
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
            yield Problem(f"{key}={number:g} is less than {least}", key, f"give {least} or more")
    if not plan.run.directory:
        yield Problem("run.directory is empty", "run.directory", "name a folder, such as runs/{recipe}")


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
    if layout.context > 1:
        said = (
            f"parallel.context={layout.context}: the loop does not cut sequences over context-parallel ranks"
        )
        yield Problem(said, "parallel.context", "set it to 1; V3 trained without, up to 128K tokens")
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
    multiple = plan.train.multiple(unit)
    if multiple < 1 or multiple % unit:
        said = f"train.batch_multiple={multiple} is not a multiple of micro_batch x data parallel = {unit}"
        yield Problem(said, "train.batch_multiple", f"use a multiple of {unit}, or null")
        return
    # Between its ends a ramp is rounded down; a batch that is written down must be one.
    written = {value: None for phase in plan.train.global_batch.phases for value in (phase.start, phase.end)}
    if odd := [f"{value:g}" for value in written if value % multiple or value < multiple]:
        amiss = "is not a multiple" if len(odd) == 1 else "are not multiples"
        what = "micro_batch x data parallel" if multiple == unit else "train.batch_multiple"
        said = f"train.global_batch={', '.join(odd)} {amiss} of {what} = {multiple}"
        yield Problem(said, "train.global_batch", f"use multiples of {multiple}")
    sequences = plan.evaluate.sequences
    if sequences % unit:
        said = f"evaluate.sequences={sequences} is not a multiple of micro_batch x data parallel = {unit}"
        yield Problem(said, "evaluate.sequences", f"use a multiple of {unit}, or 0")


CHECKS: tuple[tuple[Callable[[Plan], Iterable[Problem]], tuple[str, ...]], ...] = (
    (_sizes, ()),
    (_length, ("data", "train", "evaluate", "save", "run")),
    (_layout, ("parallel", "data", "run")),
    (_batches, ("parallel", "train", "evaluate", "run")),
)
"""What is checked of a plan, and the sections that must be sound for it, or it would blame the wrong key."""


__all__ = ["Parallel", "prepare", "run_directory", "survey"]
