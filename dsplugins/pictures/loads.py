"""Pictures of expert loads. `steps` [n] and `loads` [n, L, E], load as a multiple of the layer's mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dsplugins.pictures.style import COLOURS, figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

FAINT = "#b4c2d3"
PANELS = 8
"""Layers that one figure shows over time; more would be too small to read."""


def over_time(steps: NDArray[np.int64], loads: NDArray[np.float32], layers: Sequence[str]) -> Figure:
    """One heat map a layer, expert by step; of more than `PANELS` layers an even choice."""
    count = loads.shape[1]
    shown = np.unique(np.linspace(0, count - 1, min(count, PANELS)).round().astype(int))
    drawn, panels = figure(len(shown), row_height=1.3)
    for panel, layer in zip(panels, shown, strict=True):
        image = _heat_map(panel, loads[:, layer].T, left=float(steps[0]), right=float(steps[-1]))
        panel.set_ylabel(f"{layers[layer]}\nexpert", fontsize=8)
    panels[-1].set_xlabel("step", fontsize=9)
    chosen = "" if len(shown) == count else f" ({len(shown)} of {count} layers)"
    panels[0].set_title(f"Expert load over time{chosen}", fontsize=10, loc="left")
    _colour_bar(drawn, image, panels)
    return drawn


def at_end(loads: NDArray[np.float32], layers: Sequence[str]) -> Figure:
    """Layer by expert, mean over the last tenth of the run."""
    last = loads[-max(1, len(loads) // 10) :].mean(axis=0)
    drawn, panels = figure(1, row_height=min(8.0, 1.2 + 0.22 * len(layers)))
    image = _heat_map(panels[0], last, left=0, right=last.shape[1] - 1)
    rows = np.unique(np.linspace(0, len(layers) - 1, min(len(layers), 24)).round().astype(int))
    panels[0].set_yticks(rows, [layers[row] for row in rows])
    panels[0].set_xlabel("expert", fontsize=9)
    panels[0].set_title("Expert load, last tenth of the run", fontsize=10, loc="left")
    _colour_bar(drawn, image, panels)
    return drawn


def max_vio(steps: NDArray[np.int64], loads: NDArray[np.float32]) -> Figure:
    """(max - mean) / mean of each layer, thin, and their mean."""
    per_layer = loads.max(axis=2) - 1
    drawn, (panel,) = figure(1, row_height=2.8)
    panel.plot(steps, per_layer, color=FAINT, linewidth=0.8)
    panel.plot([], [], color=FAINT, linewidth=0.8, label="each layer")
    marker = "o" if len(steps) == 1 else None
    panel.plot(steps, per_layer.mean(axis=1), color=COLOURS[0], linewidth=1.6, marker=marker, label="mean")
    panel.set_ylim(bottom=0)
    panel.set_xlabel("step", fontsize=9)
    panel.set_title("MaxVio of each batch: (max load - mean) / mean", fontsize=10, loc="left")
    panel.legend(frameon=False, fontsize=8)
    return drawn


def _heat_map(panel: Axes, load: NDArray[np.float32], *, left: float, right: float) -> AxesImage:
    # White is the mean, red more, blue less; twice the mean and above look alike.
    half = max((right - left) / max(1, load.shape[1] - 1) / 2, 0.5)
    extent = (left - half, right + half, load.shape[0] - 0.5, -0.5)
    panel.grid(False)
    return panel.imshow(
        load, cmap="RdBu_r", vmin=0, vmax=2, aspect="auto", interpolation="nearest", extent=extent
    )


def _colour_bar(drawn: Figure, image: AxesImage, panels: Sequence[Axes]) -> None:
    bar = drawn.colorbar(image, ax=list(panels), ticks=[0, 1, 2], fraction=0.04, pad=0.02)
    bar.ax.set_yticklabels(["0", "mean", "≥ 2x"], fontsize=8)
    bar.outline.set_visible(False)
