"""Every pipeline stage of a recipe, one after the other, on the meta device: shapes without memory.

The way there is a run's: settings, groups, chunks, audit. Only the other ranks are missing, which a fake
process group stands for, and what needs memory: data-parallel buffers and the optimizer.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import megatron.core
import torch
from megatron.core import parallel_state
from torch.testing._internal.distributed.fake_pg import FakeStore

from dsplugins import audit, counts, footprint, model, settings
from dsplugins.audit.stages import misplaced, names
from dsplugins.audit.table import span
from dsplugins.contracts import Plan, Problem, Settings
from dsplugins.refusals import refusal

if TYPE_CHECKING:
    from dsplugins.manager import Plugins
    from dsplugins.recipe import Recipe

CORE = megatron.core.__path__[0]


@dataclass(frozen=True)
class Stage:
    """One rank's share of the model; an `audit.Standing`."""

    plan: Plan
    settings: Settings
    plugins: Plugins
    chunks: Sequence[torch.nn.Module]


@dataclass(frozen=True)
class Row:
    """One chunk of one stage. Numbers are those of one rank."""

    stage: int
    chunk: int
    layers: str
    """`embedding, decoder.0-3`, `mtp.0`, `head`."""
    parameters: int
    embedding_copy: int
    """How many of them are MTP's copy of the embedding, whose owner is the first stage."""
    state: footprint.Footprint
    """Bytes that last from step to step."""


@dataclass
class Found:
    """What building all stages came to."""

    rows: list[Row] = field(default_factory=list)
    counts: counts.Counts = counts.Counts()
    """Of the whole model."""
    kept: list[int | None] = field(default_factory=list)
    """`counts.kept_a_token` of each stage."""
    pairs: list[int | None] = field(default_factory=list)
    """`counts.multiplied_a_pair` of each stage."""
    problems: list[Problem] = field(default_factory=list)
    chunks: list[Sequence[torch.nn.Module]] = field(default_factory=list)
    """Of each stage."""


def build_all(recipe: Recipe, plan: Plan, plugins: Plugins) -> Found:
    """Build, audit and count each stage as one of its ranks would, in a process led to `meta`.

    The first stage that can't be built is the last one tried: the others would say the same.
    """
    found = Found()
    standing: list[str] = []
    differing: list[tuple[str, str]] = []
    for number in range(plan.layout.pipeline):
        settled = settings.construct(plan, plugins, recipe)
        with _pretended(plan, number, settled):
            stage = _stage(recipe, plan, plugins, settled, found.problems)
            if stage is None:
                return found
            differing += audit.of_stage(stage)
            found.counts += counts.of_stage(stage.chunks)
            found.rows += _rows(number, stage)
            found.kept.append(counts.kept_a_token(stage.chunks))
            found.pairs.append(counts.multiplied_a_pair(stage.chunks))
            found.chunks.append(stage.chunks)
            standing += names(settled.model, stage.chunks)
    said = [*audit.gathered(differing), *misplaced(plan, settled, standing)]
    found.problems += map(audit.problem, said)
    for _, problems in plugins.event("ds_check_built", plan=plan, stages=found.chunks):
        found.problems += problems or ()
    return found


@contextmanager
def _pretended(plan: Plan, stage: int, settled: Settings) -> Iterator[None]:
    """Be the first rank of a pipeline stage, among as many ranks as the recipe is for."""
    layout = plan.layout
    # Stages are megatron-core's slowest dimension: each is a block of neighbouring ranks.
    rank = stage * (layout.world_size // layout.pipeline)
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world_size)
    try:
        model.start_groups(layout, plan.train.seed, settled.model.pipeline_model_parallel_layout)
        assert parallel_state.get_pipeline_model_parallel_rank() == stage
        yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def _stage(
    recipe: Recipe, plan: Plan, plugins: Plugins, settled: Settings, problems: list[Problem]
) -> Stage | None:
    """This rank's chunks; None, and a problem, if megatron-core refuses to build them."""
    config: Any = settled.model
    config.use_cpu_initialization = False
    config.perform_initialization = False
    config.init_model_with_meta_device = True
    try:
        return Stage(plan, settled, plugins, model.build_chunks(plan, settled, plugins))
    except (ValueError, AssertionError) as error:
        if not traceback.extract_tb(error.__traceback__)[-1].filename.startswith(CORE):
            raise
        book = settings.ledger(plan, plugins, recipe)
        problems.append(
            refusal(str(error) or type(error).__name__, "model", book.section("model"), book.writers)
        )
        return None


def _rows(number: int, stage: Stage) -> Iterator[Row]:
    for index, chunk in enumerate(map(model.bare, stage.chunks)):
        layers = [name for name, _, _ in audit.layers.layers(stage.settings.model, [chunk])]
        parts = [*["embedding"] * chunk.pre_process, *layers, *["head"] * chunk.post_process]
        yield Row(
            stage=number,
            chunk=index,
            layers=span(parts),
            parameters=sum(parameter.numel() for parameter in chunk.parameters()),
            embedding_copy=sum(parameter.numel() for parameter in counts.copied(chunk)),
            state=footprint.expected([chunk], stage.settings, _moments(stage.plugins)),
        )


def _moments(plugins: Plugins) -> torch.dtype:
    """What the optimizer keeps its moments in: its owner's `moments`, FP32 where it has none."""
    owner = plugins.owner("optimizer")
    return getattr(torch, getattr(owner.plugin if owner else None, "moments", "float32"))


__all__ = ["Found", "Row", "Stage", "build_all"]
