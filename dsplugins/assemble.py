"""Recipe and plugins -> one rank's assembly: everything that a step needs, built, wired and audited.

Or, to look at text only, what forward passes need.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from dsplugins import audit, blame, model, process_group, routers, settings
from dsplugins.contracts import Plan, Problem, RecipeError, Settings
from dsplugins.finalize import GradientChain, all_finite

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from dsplugins.contracts import Data, PipelineSchedule, Platform
    from dsplugins.manager import Plugins
    from dsplugins.recipe import Recipe


@dataclass(frozen=True)
class Forward:
    """What one rank looks at text with: no gradients, no optimizer, no memory for them."""

    plan: Plan
    plugins: Plugins
    platform: Platform
    device: torch.device
    rank: int
    settings: Settings
    data: Data
    chunks: list[Any]
    """Model chunks, in order; of an `Assembly` in their DDP wrappers."""
    forward_backward: Callable[..., list[Any]]
    """The schedule slot's, with the signature of megatron-core's."""
    configs: tuple[Any, ...]
    """Every configuration object that a module of this rank reads; scheduled fields are set on all."""


@dataclass(frozen=True)
class Assembly(Forward):
    """What one rank trains with."""

    optimizer: Any
    balance: routers.Balance
    chain: GradientChain
    """What happens between backward and optimizer."""


def assemble(
    recipe: Recipe, plan: Plan, plugins: Plugins, platform: Platform, device: torch.device
) -> Assembly:
    """Build this rank's share of the run on `device`, which `platform` has prepared; collective.

    Raises RecipeError for what the recipe asks for and can't be, EnvironmentUnfit for what this machine
    lacks or where ranks differ, AuditFailure where something else was built than was chosen.
    """
    built, schedule = _built(recipe, plan, plugins, platform, device, to_train=True)
    settled, chunks = built.settings, built.chunks
    optimizer = plugins.slot("optimizer", config=settled.optimizer, chunks=chunks)
    balance = routers.Balance(settled.model, chunks)
    accepts = partial(all_finite, chunks) if plan.train.not_finite == "skip" else None
    chain = GradientChain(schedule.finalize_grads(), balance, accepts)
    _wire(built, optimizer, chain)
    run = Assembly(**vars(built), optimizer=optimizer, balance=balance, chain=chain)
    audit.audit(run)
    return run


def assemble_forward(
    recipe: Recipe, plan: Plan, plugins: Plugins, platform: Platform, device: torch.device
) -> Forward:
    """`assemble` without anything that only training needs: two bytes a parameter in BF16, not eighteen."""
    built, _ = _built(recipe, plan, plugins, platform, device, to_train=False)
    audit.audit_forward(built)
    return built


def _built(
    recipe: Recipe, plan: Plan, plugins: Plugins, platform: Platform, device: torch.device, to_train: bool
) -> tuple[Forward, PipelineSchedule]:
    """The model among its ranks, and the schedule slot's answer."""
    rank = process_group.start(platform, plan)
    process_group.agree(recipe, plugins)
    settled = settings.settle(plan, plugins, recipe)
    data: Data = plugins.slot("data", plan=plan)
    _check_data(plan, settled, data)
    placed = settled.model.pipeline_model_parallel_layout
    model.start_groups(plan.layout, plan.train.seed, placed, plan.run.timeout_minutes)
    schedule = plugins.slot("schedule", plan=plan)
    with blame.built_with(plugins):
        chunks = model.build(plan, settled, plugins, device, to_train)
    plugins.event("ds_model_built", plan=plan, settings=settled, chunks=chunks)
    function, configs = schedule.forward_backward(), _configs(settled, chunks)
    return Forward(plan, plugins, platform, device, rank, settled, data, chunks, function, configs), schedule


def _configs(settled: Settings, chunks: list[Any]) -> tuple[Any, ...]:
    modules = (module for chunk in chunks for module in chunk.modules())
    configs = (getattr(module, "config", None) for module in modules)
    found = {id(config): config for config in configs if isinstance(config, type(settled.model))}
    return tuple(found.values())


def _wire(run: Forward, optimizer: Any, chain: GradientChain) -> None:
    """Hand megatron-core the callables that its schedules look for in the configuration.

    With overlap these are core's own choices (megatron/training/training.py): stages reduce gradients at the
    same time, and gather weights at the same time where `align_param_gather` says so.
    """
    chunks, ddp = run.chunks, run.settings.ddp
    for config in run.configs:
        config.grad_scale_func = optimizer.scale_loss
        config.finalize_model_grads_func = chain
        config.no_sync_func = _each([chunk.no_sync for chunk in chunks])
        if ddp.overlap_grad_reduce:
            config.grad_sync_func = _each([chunk.start_grad_sync for chunk in chunks])
        if ddp.overlap_param_gather and ddp.align_param_gather:
            config.param_sync_func = _each([chunk.start_param_sync for chunk in chunks])


def _each(calls: list[Callable[..., Any]]) -> Any:
    """As core's schedules want them: a list where there are several chunks, else the one call."""
    return calls if len(calls) > 1 else calls[0]


def _check_data(plan: Plan, settled: Settings, data: Data) -> None:
    owner, problems = plan.slots["data"], []
    if data.vocab_size > settled.vocab_size:
        said = f"model.vocab_size={settled.vocab_size} is less than the {data.vocab_size} tokens of {owner}"
        problems.append(Problem(said, "model.vocab_size", f"set it to {data.vocab_size} or more"))
    if plan.evaluate.sequences and data.validation_size < plan.train.micro_batch * plan.layout.data:
        said = f"{owner} has {data.validation_size} validation samples, fewer than one a rank"
        problems.append(Problem(said, "evaluate.sequences", "set it to 0 or shorten data.seq_length"))
    if problems:
        raise RecipeError(problems)


__all__ = ["Assembly", "Forward", "assemble", "assemble_forward"]
