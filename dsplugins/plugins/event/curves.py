"""Pictures of a run at its end: losses and schedules over steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from dsplugins.contracts import Problem
from dsplugins.hookspecs import hookimpl

if TYPE_CHECKING:
    from dsplugins.contracts import Plan, RunEnd, Settings


@dataclass(frozen=True)
class CurvesOptions:
    """Options of Curves."""

    plots: bool = True
    """Draw at the end of the run; needs matplotlib."""


class Curves:
    """Draws `plots/losses.png` and `plots/schedules.png` when the run ends.

    From `metrics.jsonl` and `evaluations.jsonl`, so all processes of a run that was stopped are in them.
    """

    Options = CurvesOptions
    contract = ">=1.0,<2"
    requires: ClassVar[tuple[str, ...]] = ()
    conflicts: ClassVar[tuple[str, ...]] = ()
    env: ClassVar[Mapping[str, str]] = {}

    def __init__(self, options: CurvesOptions) -> None:
        self._options = options

    @hookimpl
    def ds_check(self, plan: Plan, settings: Settings) -> Iterator[Problem]:
        """Whether there are means to draw."""
        from dsplugins.pictures.style import matplotlib_problem

        if self._options.plots:
            yield from matplotlib_problem("curves")

    @hookimpl
    def ds_run_end(self, end: RunEnd) -> Mapping[str, Any] | None:
        """Draw what was logged; nothing where no step was."""
        if not self._options.plots:
            return None
        from dsplugins.pictures import curves
        from dsplugins.pictures.style import read_evaluations, read_metrics, save

        rows = read_metrics(end.directory)
        if not rows:
            return None
        validation = {row["step"]: row["loss"] for row in read_evaluations(end.directory)}
        folder = end.directory / "plots"
        losses = curves.losses(rows, validation, end.baselines)
        return {
            "losses_plot": save(losses, folder / "losses.png"),
            "schedules_plot": save(curves.schedules(rows), folder / "schedules.png"),
        }
