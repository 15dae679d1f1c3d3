"""The picture of the FP8 experiment: losses, and how far each way is from BF16. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsplugins.experiments.fp8 import BASE, LIMITS, Measured, gaps, smoothed, warm_up

LOOKS = {
    "twin": ("BF16, weights one ulp away", "#5b7083"),
    "rough": ("BF16, weights 2.6 % away", "#d9a441"),
    "fp8_v3": ("fp8_v3", "#1f5fa8"),
}
"""Way -> name and colour."""


def draw(measured: Sequence[Measured], path: Path) -> None:
    """Write a PNG: smoothed losses of the first seed on the left, relative differences of all beside."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 3.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _losses(left, measured)
    _gaps(right, measured)
    for panel in (left, right):
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(True, color="#e4e4e4", linewidth=0.6)
        panel.set_axisbelow(True)
        panel.tick_params(labelsize=8)
        panel.margins(x=0)
        panel.set_xlabel("step", fontsize=9)
        panel.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def _losses(panel: Any, measured: Sequence[Measured]) -> None:
    first = min(one.seed for one in measured)
    looks = {BASE: ("BF16", "#c8553d"), **LOOKS}
    for one in (one for one in measured if one.seed == first and one.way in looks):
        name, colour = looks[one.way]
        curve = smoothed(one.losses)
        panel.plot(np.arange(1, len(curve) + 1), curve, color=colour, linewidth=1.2, label=name)
    panel.set_title("loss, nats a token, smoothed (one seed)", fontsize=10, loc="left")


def _gaps(panel: Any, measured: Sequence[Measured]) -> None:
    for way, (name, colour) in LOOKS.items():
        for seed, gap in gaps(measured, way).items():
            steps = np.arange(1, len(gap) + 1)
            label = name if seed == min(one.seed for one in measured) else None
            panel.plot(steps, 100 * gap, color=colour, linewidth=1.0, alpha=0.8, label=label)
    panel.axvspan(1, warm_up(len(measured[0].losses)), color="#000000", alpha=0.06, linewidth=0)
    limit = 100 * LIMITS["fp8_v3"]
    for side in (limit, -limit):
        panel.axhline(side, color="#000000", linewidth=0.8, linestyle=":")
    panel.set_ylim(-2 * limit, 2 * limit)
    panel.set_title("difference from BF16, % (every seed)", fontsize=10, loc="left")
