"""What FP8 does to each operand of each product: error, underflow, saturation, every so many steps."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from dsplugins.contracts import Problem, Range, RecipeError
from dsplugins.hookspecs import hookimpl

if TYPE_CHECKING:
    import torch

    from dsplugins.contracts import Evaluation, Plan, RunEnd, Step
    from dsplugins.numerics.watch import Watch
    from dsplugins.plugins.event.fp8.errors import Errors, Ledger

FILE = "fp8_monitor.json"
SHOWN = 5
"""Rows that are printed at the end of a run."""


@dataclass(frozen=True)
class Fp8MonitorOptions:
    """Options of Fp8Monitor."""

    every: Annotated[int, Range(1, None)] = 100
    """Steps between two that are looked at. The first step of a process is looked at in any case."""


class Fp8Monitor:
    """Looks at what a precision plugin quantises, in some steps, on all ranks; other steps are left alone.

    For each layer and linear, and each operand of its three products (`fprop.x`, `fprop.w`, `dgrad.dy`,
    `wgrad.dy`, `wgrad.x`): the relative error |x - Q(x)| / |x|, the share of numbers that became zero, the
    share that was cut at the format's largest number, and how many aren't finite. The table of the last such
    step is `fp8_monitor.json`; `metrics.jsonl` gets `fp8_error`, the largest, with `fp8_error_at`,
    `fp8_underflow`, the largest, and `fp8_not_finite`, the sum. Experts of a layer count as one.
    """

    Options = Fp8MonitorOptions
    contract = ">=1.3,<2"

    def __init__(self, options: Fp8MonitorOptions) -> None:
        self._every = options.every
        self._watches: list[tuple[str, Watch]] = []
        self._ledger: Ledger | None = None
        self._path: Path | None = None
        self._last: list[Errors] = []
        self._looking = False

    @hookimpl
    def ds_check_built(self, plan: Plan, stages: Sequence[Sequence[torch.nn.Module]]) -> Iterable[Problem]:
        """Whether the model quantises anything."""
        from dsplugins.plugins.event.fp8.names import watches

        if not any(True for chunks in stages for _ in watches(chunks)):
            yield _nothing_to_see(plan)

    @hookimpl
    def ds_model_built(self, plan: Plan, chunks: Sequence[torch.nn.Module]) -> None:
        """Find what there is to look at, of some stages nothing; refuse a model that quantises nothing."""
        import torch

        from dsplugins.plugins.event.fp8.errors import Ledger
        from dsplugins.plugins.event.fp8.names import watches

        self._watches = list(watches(chunks))
        seen = next(iter(chunks[0].parameters())).new_tensor(len(self._watches), dtype=torch.int32)
        torch.distributed.all_reduce(seen)
        if not seen:
            raise RecipeError([_nothing_to_see(plan)])
        self._path = Path(plan.run.directory) / FILE
        self._ledger = Ledger()
        self._look(True)

    @hookimpl
    def ds_step_end(self, step: Step) -> Mapping[str, Any] | None:
        """Gather what was seen in this step, if it was looked at; look at the next one if that is due."""
        found = self._gathered(step.step) if self._looking else None
        self._look((step.step + 1) % self._every == 0)
        return found

    @hookimpl
    def ds_evaluated(self, evaluation: Evaluation) -> None:
        """An evaluation is no step: what was seen of it is forgotten."""
        if self._ledger is not None:
            self._ledger.taken()

    @hookimpl
    def ds_run_end(self, end: RunEnd) -> Mapping[str, Any] | None:
        """The largest errors of the last step that was looked at."""
        named = {
            f"FP8 error, {row.module} {row.operand}": f"{row.error:.4f}, underflow {row.underflow:.4f}"
            for row in self._last[:SHOWN]
        }
        return {"FP8, each operand": str(end.directory / FILE), **named} if named else None

    def _look(self, wanted: bool) -> None:
        """Begin or end to look; what isn't looked at costs a comparison a tensor."""
        if wanted == self._looking:
            return
        self._looking = wanted
        for name, watch in self._watches:
            assert self._ledger is not None, "ds_model_built comes first"
            watch.look = partial(self._ledger.add, name) if wanted else None

    def _gathered(self, step: int) -> Mapping[str, Any]:
        """Rows of all ranks together; collective. Rank 0 keeps the table."""
        import torch.distributed as dist

        from dsplugins.plugins.event.fp8.errors import as_json, merged

        assert self._ledger is not None and self._path is not None, "ds_model_built comes first"
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, self._ledger.taken())
        self._last = merged(ranks)
        if dist.get_rank() == 0:
            partial_file = self._path.with_suffix(".json.partial")
            partial_file.write_text(json.dumps(as_json(step, self._last), indent=1) + "\n")
            os.replace(partial_file, self._path)
        worst = self._last[0]
        return {
            "fp8_error": worst.error,
            "fp8_error_at": f"{worst.module} {worst.operand}",
            "fp8_underflow": max(row.underflow for row in self._last),
            "fp8_not_finite": sum(row.not_finite for row in self._last),
        }


def _nothing_to_see(plan: Plan) -> Problem:
    owner = plan.slots["precision"]
    said = f"fp8_monitor has nothing to look at: {owner} quantises nothing, or shows nothing of it"
    remedy = "plugins.fp8_monitor=null, or a precision plugin such as fp8_v3"
    return Problem(said, "plugins.fp8_monitor", remedy)
