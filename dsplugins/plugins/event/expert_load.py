"""How evenly the experts are used: numbers while training, pictures at the end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from dsplugins.contracts import Problem, Range
from dsplugins.hookspecs import hookimpl

if TYPE_CHECKING:
    from dsplugins.contracts import Plan, RunEnd, Settings, Step
    from dsplugins.pictures.history import LoadHistory


@dataclass(frozen=True)
class ExpertLoadOptions:
    """Options of ExpertLoad."""

    every: Annotated[int, Range(1, None)] = 1
    """Steps between two looks. Each adds L x E numbers to `metrics.jsonl`: 100 kB for V3's 59 x 256."""
    plots: bool = True
    """Draw heat maps of the load and curves of MaxVio when the run ends; needs matplotlib."""


class ExpertLoad:
    """Logs each expert's load and MaxVio of each layer: (max - mean) / mean (arXiv 2408.15664).

    Adds to `metrics.jsonl` every `every` steps: `expert_load` [L][E], load as a multiple of the
    layer's mean; `max_vio_per_layer` [L]; `dead_experts`, how many (layer, expert) pairs got no
    token in that step.
    """

    Options = ExpertLoadOptions
    contract = ">=1.0,<2"
    requires: ClassVar[tuple[str, ...]] = ("router",)
    conflicts: ClassVar[tuple[str, ...]] = ()
    env: ClassVar[Mapping[str, str]] = {}

    def __init__(self, options: ExpertLoadOptions) -> None:
        self._options = options
        self._history: LoadHistory | None = None
        self._layers: tuple[str, ...] = ()

    @hookimpl
    def ds_check(self, plan: Plan, settings: Settings) -> Iterator[Problem]:
        """Whether there are experts to watch and means to draw."""
        from dsplugins.pictures.style import matplotlib_problem

        if not settings.model.num_moe_experts:
            yield Problem(
                "plugins.expert_load watches experts, and this model has none (model.num_moe_experts)",
                key="plugins.expert_load",
                remedy="plugins.expert_load=null",
            )
        if self._options.plots:
            yield from matplotlib_problem("expert_load")

    @hookimpl
    def ds_step_end(self, step: Step) -> Mapping[str, Any] | None:
        """Loads of this step, if it is one to look at."""
        if step.expert_counts is None or step.step % self._options.every:
            return None
        from dsplugins.pictures.history import LoadHistory

        counts = step.expert_counts.double()
        # A layer without a single token has no shape; a mean of one shows it as idle, not as a division by 0.
        load = counts / counts.mean(dim=1, keepdim=True).where(counts.sum(dim=1, keepdim=True) > 0, 1)
        self._history = self._history or LoadHistory()
        self._history.add(step.step, load.float().numpy())
        self._layers = step.router_layers
        return {
            "max_vio_per_layer": [round(value, 4) for value in (load.amax(dim=1) - 1).tolist()],
            "dead_experts": int((counts == 0).sum()),
            "expert_load": [[round(value, 3) for value in row] for row in load.tolist()],
        }

    @hookimpl
    def ds_run_end(self, end: RunEnd) -> Mapping[str, Any] | None:
        """Draw `plots/expert_load_over_time.png`, `plots/expert_load.png` and `plots/max_vio.png`."""
        if self._history is None or not self._options.plots:
            return None
        from dsplugins.pictures import loads as drawn
        from dsplugins.pictures.style import read_metrics, save

        steps, loads = self._history.since_start(read_metrics(end.directory))
        folder = end.directory / "plots"
        over_time = drawn.over_time(steps, loads, self._layers)
        return {
            "expert_load_over_time_plot": save(over_time, folder / "expert_load_over_time.png"),
            "expert_load_plot": save(drawn.at_end(loads, self._layers), folder / "expert_load.png"),
            "max_vio_plot": save(drawn.max_vio(steps, loads), folder / "max_vio.png"),
        }
