"""The picture of the balance experiment: MaxVio over the steps, three ways. Needs matplotlib, no display."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dsplugins.experiments.balance import Measured, window

LOOKS = {
    "none": ("no balancing", "#5b7083"),
    "aux_loss": ("auxiliary loss, 1e-3", "#c8553d"),
    "aux_free": ("bias (aux_free)", "#1f5fa8"),
}
"""Way -> name and colour, from the top of the picture down."""


def draw(measured: Sequence[Measured], path: Path) -> None:
    """Write a PNG: mean over seeds as a line, lowest to highest seed as a band, measured steps shaded."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 3.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panel = figure.subplots()
    seeds = len({one.seed for one in measured})
    for way, (name, colour) in LOOKS.items():
        curves = np.stack([one.curve for one in measured if one.way == way])
        steps = np.arange(1, curves.shape[1] + 1)
        panel.fill_between(
            steps, curves.min(axis=0), curves.max(axis=0), color=colour, alpha=0.2, linewidth=0
        )
        panel.plot(steps, curves.mean(axis=0), color=colour, linewidth=1.4, label=name)
    panel.axvspan(steps[-window(len(steps))], steps[-1], color="#000000", alpha=0.04, linewidth=0)
    panel.set_ylim(bottom=0)
    panel.margins(x=0)
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(True, color="#e4e4e4", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.tick_params(labelsize=8)
    panel.set_xlabel("step", fontsize=9)
    over = "one seed" if seeds == 1 else f"{seeds} seeds: mean, lowest to highest"
    panel.set_title(f"MaxVio of each batch, mean over layers ({over})", fontsize=10, loc="left")
    panel.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
