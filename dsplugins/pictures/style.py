"""Figures in one plain style. Needs matplotlib, drawn by Agg: no display, no pyplot, no global state."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsplugins import kept
from dsplugins.contracts import Problem

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, GRID = "#333333", "#e4e4e4"
COLOURS = ("#1f5fa8", "#c8553d", "#2f8f5b", "#8a6bb1", "#b98a1d", "#5b7083")


def matplotlib_problem(plugin: str) -> Iterator[Problem]:
    """A problem where `plugin` is to draw and can't."""
    if importlib.util.find_spec("matplotlib") is None:
        yield Problem(
            f"plugins.{plugin}.plots needs matplotlib, which is not installed",
            key=f"plugins.{plugin}.plots",
            remedy=f"pip install 'dsplugins[plot]' or plugins.{plugin}.plots=false",
            kind="environment",
        )


def figure(rows: int, *, width: float = 7.0, row_height: float = 2.2) -> tuple[Figure, list[Axes]]:
    """A figure with `rows` panels below each other; sizes in inches, 120 dots each."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(width, row_height * rows + 0.6), dpi=120, layout="constrained")
    FigureCanvasAgg(drawn)
    panels = drawn.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
    for panel in panels:
        _plain(panel)
    return drawn, list(panels)


def save(drawn: Figure, path: Path) -> str:
    """Write a PNG, making its folder; its path as text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, format="png")
    return str(path)


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """Rows of `metrics.jsonl` by step; of a step that was run twice (after a resume) the later row.

    A last line that a killed process left half written is dropped; a broken one elsewhere raises RecipeError.
    """
    return _read(directory / "metrics.jsonl")


def read_evaluations(directory: Path) -> list[dict[str, Any]]:
    """The same of `evaluations.jsonl`."""
    return _read(directory / "evaluations.jsonl")


def _read(path: Path) -> list[dict[str, Any]]:
    rows = {row["step"]: row for row in kept.steps(path)}
    return [rows[step] for step in sorted(rows)]


def _plain(panel: Axes) -> None:
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color(INK)
    panel.tick_params(colors=INK, labelsize=8)
    panel.grid(True, color=GRID, linewidth=0.6)
    panel.set_axisbelow(True)
