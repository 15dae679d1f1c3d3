"""Pictures of a run at its end: losses and schedules over steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from dsplugins.contracts import Problem
from dsplugins.hookspecs import hookimpl

if TYPE_CHECKING:
    from dsplugins.contracts import Evaluation, Plan, RunEnd, Settings


@dataclass(frozen=True)
class CurvesOptions:
    """Options of Curves."""

    plots: bool = True
    """Draw at the end of the run; needs matplotlib."""


class Curves:
    """Draws `plots/losses.png` and `plots/schedules.png` from `metrics.jsonl` when the run ends.

    Losses of all processes of the run are drawn; validation losses are those of the last process,
    as `metrics.jsonl` has none.
    """

    Options = CurvesOptions
    contract = ">=1.0,<2"
    requires: ClassVar[tuple[str, ...]] = ()
    conflicts: ClassVar[tuple[str, ...]] = ()
    env: ClassVar[Mapping[str, str]] = {}

    def __init__(self, options: CurvesOptions) -> None:
        self._options = options
        self._validation: dict[int, float] = {}

    @hookimpl
    def ds_check(self, plan: Plan, settings: Settings) -> Iterator[Problem]:
        """Whether there are means to draw."""
        from dsplugins.plugins.event.plots import matplotlib_problem

        if self._options.plots:
            yield from matplotlib_problem("curves")

    @hookimpl
    def ds_evaluated(self, evaluation: Evaluation) -> None:
        """Remember a point of the validation curve."""
        self._validation[evaluation.step] = evaluation.loss

    @hookimpl
    def ds_run_end(self, end: RunEnd) -> Mapping[str, Any] | None:
        """Draw what was logged; nothing where no step was."""
        if not self._options.plots:
            return None
        from dsplugins.plugins.event import curve_plots
        from dsplugins.plugins.event.plots import read_metrics, save

        rows = read_metrics(end.directory)
        if not rows:
            return None
        if end.evaluation is not None:
            self._validation[end.evaluation.step] = end.evaluation.loss
        folder = end.directory / "plots"
        losses = curve_plots.losses(rows, self._validation, end.baselines)
        return {
            "losses_plot": save(losses, folder / "losses.png"),
            "schedules_plot": save(curve_plots.schedules(rows), folder / "schedules.png"),
        }
