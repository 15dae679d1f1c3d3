"""Bytes and calls of each kind of collective in each group, counted in real steps, beside the predicted."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from dsplugins.contracts import Problem, Range
from dsplugins.hookspecs import hookimpl

if TYPE_CHECKING:
    import torch

    from dsplugins.contracts import Evaluation, Plan, RunEnd, Settings, Step
    from dsplugins.plugins.event.wire.prediction import Rank
    from dsplugins.plugins.event.wire.table import Table
    from dsplugins.plugins.event.wire.tally import Tally


@dataclass(frozen=True)
class BytesOnWireOptions:
    """Options of BytesOnWire."""

    every: Annotated[int, Range(1, None)] = 50
    """Steps between two measured ones. The second step of a process is measured in any case; the first never
    is: groups connect in it."""


class BytesOnWire:
    """Counts what `torch.distributed` is asked to move in some steps: calls, payload and bytes sent, by kind
    (`all_to_all`, `reduce_scatter`, ...) and by megatron-core's groups (`expert`, `data`, ...).

    *Payload* is the size of the whole buffers: what is reduced, what a gather puts together, what a rank puts
    into an all-to-all. *Sent* is what leaves a rank if a collective goes round a ring: (n - 1) / n of the
    payload, twice that in an all-reduce; in an all-to-all, exactly what isn't for the rank itself. Groups of
    one rank are left out, and so is what goes around `torch.distributed` (DeepEP's own transport).

    Adds to `metrics.jsonl` in measured steps `wire_bytes` (sent, mean over the ranks), `wire_bytes_max` (by
    the rank that sends most) and `wire_calls` (the most that a rank makes). At the end it writes
    `bytes_on_wire.json`: means over the measured steps, and the payload predicted from the recipe's sizes;
    null where it can't be told. Other steps are left alone. A step right after an evaluation isn't measured,
    the next one is. What is saved in the background meanwhile is seen, in the group `other`.
    """

    Options = BytesOnWireOptions
    contract = ">=1.0,<2"
    requires: ClassVar[tuple[str, ...]] = ()
    conflicts: ClassVar[tuple[str, ...]] = ()
    env: ClassVar[Mapping[str, str]] = {}

    def __init__(self, options: BytesOnWireOptions) -> None:
        self._every = options.every
        self._rank: Rank | None = None
        self._tally: Tally | None = None
        self._table: Table | None = None
        self._due = True

    @hookimpl
    def ds_check(self, plan: Plan, settings: Settings) -> Iterable[Problem]:
        """One process sends nothing; a run that is over before a step is measured shows nothing."""
        if plan.layout.world_size == 1:
            said = "plugins.bytes_on_wire has nothing to count: one process sends nothing"
            yield Problem(said, "plugins.bytes_on_wire", "plugins.bytes_on_wire=null")
        if plan.train.steps == 1:
            said = "plugins.bytes_on_wire measures from the second step on, and train.steps=1"
            yield Problem(said, "train.steps", "at least 2")

    @hookimpl
    def ds_model_built(self, plan: Plan, settings: Settings, chunks: Sequence[torch.nn.Module]) -> None:
        """Take down the shapes that predictions are made of."""
        from megatron.core import parallel_state

        from dsplugins.plugins.event.wire.prediction import Rank, bare
        from dsplugins.plugins.event.wire.table import Table
        from dsplugins.plugins.event.wire.tally import Tally

        stage = parallel_state.get_pipeline_model_parallel_rank()
        self._rank = Rank(plan, settings, [bare(chunk) for chunk in chunks], stage)
        self._tally, self._table = Tally(), Table()

    @hookimpl
    def ds_step_end(self, step: Step) -> Mapping[str, Any] | None:
        """Gather what was counted in this step, if it was; begin to count if the next one is due."""
        assert self._rank is not None and self._tally is not None, "ds_model_built comes first"
        found = self._gathered(step) if self._tally.runs else None
        self._due = self._due or (step.step + 1) % self._every == 0
        if self._due and not self._rank.plan.train.over(step.step, step.tokens):
            self._due = False
            self._tally.start()
        return found

    @hookimpl
    def ds_evaluated(self, evaluation: Evaluation) -> None:
        """An evaluation is no step: what was begun is dropped, and the step after the next one taken."""
        if self._tally is not None and self._tally.runs:
            self._tally.stop()
            self._due = True

    @hookimpl
    def ds_run_end(self, end: RunEnd) -> Mapping[str, Any] | None:
        """Write `bytes_on_wire.json` and show its rows."""
        assert self._table is not None, "ds_model_built comes first"
        if not self._table.steps:
            return {
                "no step was measured": f"{end.steps} steps are behind, and none of this process's was due"
            }
        path = end.directory / "bytes_on_wire.json"
        path.write_text(json.dumps(self._table.as_json(), indent=1) + "\n")
        steps = ", ".join(map(str, self._table.steps))
        return {"bytes a rank and step": f"{path}, mean of steps {steps}", **dict(self._table.lines())}

    def _gathered(self, step: Step) -> Mapping[str, Any]:
        """This step's reports of all ranks; collective."""
        import torch

        from dsplugins.plugins.event.wire.prediction import predict
        from dsplugins.plugins.event.wire.table import totals

        assert self._rank is not None and self._tally is not None and self._table is not None
        plan, counted = self._rank.plan, self._tally.stop()
        micro_batches = step.global_batch // (plan.layout.data * plan.train.micro_batch)
        reports: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(reports, (counted, predict(self._rank, micro_batches)))
        self._table.add(step.step, reports)
        return totals(reports)
