"""Recipe + plugins -> megatron-core's configuration objects, each field with its one writer."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dsplugins.contracts import Plan, Problem, RecipeError, Settings
from dsplugins.megatron_fields import known_fields
from dsplugins.refusals import refusal
from dsplugins.schedules import Schedule
from dsplugins.typed import check_megatron

if TYPE_CHECKING:
    from dsplugins.contracts import PipelineSchedule
    from dsplugins.manager import Plugins
    from dsplugins.recipe import Recipe

SECTIONS = ("model", "optimizer", "ddp")
SCHEDULABLE = ("moe_router_bias_update_rate", "mtp_loss_scaling_factor", "moe_aux_loss_coeff")
"""Fields that megatron-core or a router reads anew in each step."""


FOLLOWING = {"model.params_dtype": "model.bf16 and model.fp16", "model.pipeline_dtype": "model.params_dtype"}
"""Fields that `_translate` sets where nobody does -> what they follow."""


class Ledger:
    """Dotted Megatron field -> (value, writer). Two writers with two values are a problem."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.writers: dict[str, str] = {}
        self.problems: list[Problem] = []

    def write(self, key: str, value: Any, writer: str) -> None:
        """Note that `writer` sets `key`; the first writer stays when they agree."""
        if key not in self.values:
            self.values[key], self.writers[key] = value, writer
        elif _plain(self.values[key]) != _plain(value):
            said = (
                f"{key} has two writers: {self.writers[key]} sets {_show(self.values[key])}, "
                f"{writer} sets {_show(value)}"
            )
            self.problems.append(Problem(said, key, f"drop one of them: leave {key} to one writer"))

    def section(self, name: str) -> dict[str, Any]:
        """The fields of one section, without its name."""
        return {k.split(".", 1)[1]: v for k, v in self.values.items() if k.startswith(name + ".")}


def _plain(value: Any) -> Any:
    if isinstance(value, Schedule):
        return value.at(0, 0) if value.is_constant else value.to_raw()
    return list(value) if isinstance(value, tuple) else value


def _show(value: Any) -> str:
    return str(value) if isinstance(value, Schedule) else repr(value)


def ledger(plan: Plan, plugins: Plugins, recipe: Recipe | None = None) -> Ledger:
    """Who writes which Megatron field: the recipe's sections, the layout, then each plugin. No torch."""
    book = Ledger()
    for section in SECTIONS:
        for field, value in getattr(plan, section).items():
            key = f"{section}.{field}"
            book.write(key, value, (recipe.place(key) if recipe else "") or "recipe")
    for key, value in _derived(plan).items():
        book.write(key, value, "derived")
    wished = plugins.event("ds_settings", plan=plan)
    # Stand-ins come last and have their way: the recipe is written for the plugins that they replace.
    for name, wishes in sorted(wished, key=lambda item: item[0] in plugins.stand_ins):
        for key, value in (wishes or {}).items():
            if fault := _no_field(key):
                said = f"plugin {name} writes {key}, {fault}"
                book.problems.append(Problem(said, f"plugins.{name}", "tell its author"))
                continue
            if name in plugins.stand_ins:
                book.values.pop(key, None)
            book.write(key, value, f"plugin {name}")
    return book


def _no_field(key: str) -> str:
    """What is wrong with a key that a plugin writes; nothing where megatron-core has the field."""
    section, _, field = key.partition(".")
    if section not in SECTIONS:
        return f"which is in none of {', '.join(SECTIONS)}"
    names = known_fields(section)
    if field in names:
        return ""
    near = difflib.get_close_matches(field, names, n=1)
    return "a field that megatron-core doesn't have" + (f"; it has {near[0]}" if near else "")


def _derived(plan: Plan) -> dict[str, Any]:
    layout = plan.layout
    derived: dict[str, Any] = {
        "model.tensor_model_parallel_size": layout.tensor,
        "model.pipeline_model_parallel_size": layout.pipeline,
        "model.context_parallel_size": layout.context,
        "model.expert_model_parallel_size": layout.expert,
        "model.expert_tensor_parallel_size": layout.expert_tensor,
        "model.sequence_parallel": layout.tensor > 1,
        # The host updates the router's bias from its own contract; core must not do it a second time.
        "model.moe_router_enable_expert_bias": False,
    }
    if layout.virtual_pipeline > 1:
        derived["model.virtual_pipeline_model_parallel_size"] = layout.virtual_pipeline
    return derived


def settle(plan: Plan, plugins: Plugins, recipe: Recipe) -> Settings:
    """megatron-core's objects for this plan. Imports megatron-core.

    Raises RecipeError with every problem: unknown fields, two writers, what megatron-core's own
    validation refuses, what plugins' `ds_check` and the pipeline schedule refuse.
    """
    settings = construct(plan, plugins, recipe)
    problems = objections(plan, plugins, settings)
    if problems:
        raise RecipeError(recipe.located(problems))
    return settings


def construct(plan: Plan, plugins: Plugins, recipe: Recipe) -> Settings:
    """megatron-core's objects, and who wrote each field. Raises RecipeError as `settle` does, but for
    what plugins and the pipeline schedule object to: they are not asked.
    """
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    book = ledger(plan, plugins, recipe)
    model = book.section("model")
    vocab_size = model.pop("vocab_size")
    scheduled = {k: v for k, v in model.items() if isinstance(v, Schedule)}
    problems = list(book.problems)
    for field in set(scheduled) - set(SCHEDULABLE):
        said = f"model.{field} can't follow a schedule: megatron-core reads it once"
        problems.append(Problem(said, f"model.{field}", f"only these can: {', '.join(SCHEDULABLE)}"))
    model |= {k: v.at(0, 0) for k, v in scheduled.items()}
    classes = {
        "model": MLATransformerConfig,
        "optimizer": OptimizerConfig,
        "ddp": DistributedDataParallelConfig,
    }
    values = {"model": model, "optimizer": book.section("optimizer"), "ddp": book.section("ddp")}
    for section, cls in classes.items():
        problems += (_by(problem, book) for problem in check_megatron(cls, values[section], section))
    if problems:
        raise RecipeError(recipe.located(problems))
    _translate(values["model"])
    built = {name: _construct(classes[name], values[name], name, book, problems) for name in SECTIONS}
    if problems:
        raise RecipeError(recipe.located(problems))
    return Settings(built["model"], built["optimizer"], built["ddp"], vocab_size, scheduled, book.writers)


def _by(problem: Problem, book: Ledger) -> Problem:
    """A fault of a value, as the fault of the plugin that wrote it, if one did."""
    writer = book.writers.get(problem.key, "")
    if not writer.startswith("plugin "):
        return problem
    name = writer.removeprefix("plugin ")
    return replace(problem, message=f"{problem.message}; {writer} writes it", key=f"plugins.{name}")


def objections(plan: Plan, plugins: Plugins, settings: Settings) -> list[Problem]:
    """What plugins find wrong with the settings, and batches that the pipeline schedule refuses."""
    problems = list(_unserved(settings))
    told = {problem.key for problem in problems}
    for _, found in plugins.event("ds_check", plan=plan, settings=settings):
        problems += (problem for problem in found or () if problem.key not in told)
    return [*problems, *_other_chunks(plan, plugins, problems), *refused_batches(plan, plugins)]


def _other_chunks(plan: Plan, plugins: Plugins, problems: Iterable[Problem]) -> Iterator[Problem]:
    """A schedule that holds other chunks a rank than the layout has, unless it says so itself."""
    key, wanted = "parallel.virtual_pipeline", plan.layout.virtual_pipeline
    held = plugins.slot("schedule", plan=plan).chunks
    if held != wanted and all(problem.key != key for problem in problems):
        said = f"{plan.slots['schedule']} holds {held} chunks a rank, {key} is {wanted}"
        yield Problem(said, key, f"set it to {held}, or name another schedule")


def _unserved(settings: Settings) -> Iterator[Problem]:
    """Fields that would make wrong numbers without a word, whichever plugins are chosen."""
    config = settings.model
    if config.calculate_per_token_loss:
        said = "model.calculate_per_token_loss=True: the loop's loss is the mean of a micro-batch"
        yield Problem(said, "model.calculate_per_token_loss", "leave it out: all samples are equally long")
    for field in ("hidden_dropout", "attention_dropout"):
        if getattr(config, field):
            said = f"model.{field}={getattr(config, field)}: another layout would draw other masks"
            yield Problem(said, f"model.{field}", "set it to 0.0, as V3 did")


def _translate(model: dict[str, Any]) -> None:
    """Words for what Megatron wants as Python objects: activations and dtypes."""
    import torch
    from torch.nn import functional

    activations = {"silu": functional.silu, "gelu": functional.gelu, "relu": functional.relu}
    name = model.get("activation_func")
    if isinstance(name, str):
        if name not in activations:
            said = f"model.activation_func={name} is not one of {', '.join(activations)}"
            raise RecipeError([Problem(said, "model.activation_func", "V3 uses silu")])
        model["activation_func"] = activations[name]
    dtype = torch.bfloat16 if model.get("bf16") else torch.float16 if model.get("fp16") else torch.float32
    model.setdefault("params_dtype", dtype)
    if model.get("pipeline_model_parallel_size", 1) > 1:
        model.setdefault("pipeline_dtype", dtype)


def _construct(
    cls: type, values: Mapping[str, Any], section: str, book: Ledger, problems: list[Problem]
) -> Any:
    try:
        return cls(**values)
    except (ValueError, AssertionError, TypeError, NotImplementedError, ZeroDivisionError) as error:
        problems.append(refusal(str(error) or type(error).__name__, section, values, book.writers))
        return None


def refused_batches(plan: Plan, plugins: Plugins) -> list[Problem]:
    """Micro-batch counts that the batch schedule will take and the pipeline schedule refuses."""
    schedule = plugins.slot("schedule", plan=plan)
    unit = plan.train.micro_batch * plan.layout.data
    counts = [batch // unit for batch in plan.train.global_batch.distinct(plan.train.multiple(unit))]
    reasons = {count: reason for count in counts if (reason := schedule.refuses(count))}
    if not reasons:
        return list(_refused_evaluation(plan, schedule, unit))
    allowed = [count for count in counts if count not in reasons]
    first, reason = next(iter(reasons.items()))
    owner = plan.slots["schedule"]
    said = f"{owner} refuses train.global_batch: {reason}"
    if len(counts) > 1:
        said = (
            f"train.global_batch comes to {len(counts)} micro-batch counts a step, {spans(counts)}, of which "
            f"{owner} refuses {len(reasons)}: {spans(list(reasons))}; why {first}: {reason}"
        )
    remedy = f"{owner} allows {spans(allowed)}, " if allowed else ""
    remedy += f"a step has global batch / {unit} micro-batches; change the batch, the layout or the schedule"
    return [Problem(said, "train.global_batch", remedy)]


def _refused_evaluation(plan: Plan, schedule: PipelineSchedule, unit: int) -> Iterator[Problem]:
    """An evaluation runs through the schedule, too; only chunks must be filled in groups."""
    count = plan.evaluate.sequences // unit
    if count and plan.layout.virtual_pipeline > 1 and (reason := schedule.refuses(count)):
        said = f"{plan.slots['schedule']} refuses evaluate.sequences={plan.evaluate.sequences}: {reason}"
        remedy = f"an evaluation has evaluate.sequences / {unit} micro-batches"
        yield Problem(said, "evaluate.sequences", remedy)


def spans(numbers: Sequence[int]) -> str:
    """Sorted numbers in words: `24-26, 28, 30-120`; long lists are cut in the middle."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    words = ["-".join(map(str, run)) for run in runs]
    return ", ".join(words if len(words) <= 8 else [*words[:5], "...", *words[-2:]])


__all__ = ["Ledger", "construct", "ledger", "objections", "refused_batches", "settle", "spans"]
