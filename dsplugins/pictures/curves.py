"""Pictures of `metrics.jsonl`: `rows` are its rows, one a step, oldest first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dsplugins.pictures.style import COLOURS, INK, figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]

SCHEDULES = {
    "learning_rate": "learning rate",
    "global_batch": "sequences a step",
    "bias_update_rate": "bias update rate",
    "mtp_weight": "MTP weight",
}


def losses(rows: Rows, validation: Mapping[int, float], baselines: Mapping[str, float]) -> Figure:
    """Training and MTP loss (thin: each step, thick: running mean), validation points, baseline lines."""
    drawn, (panel,) = figure(1, width=7.5, row_height=3.8)
    _line(panel, rows, "loss", "training", COLOURS[0])
    _line(panel, rows, "mtp_loss", "MTP", COLOURS[1])
    if validation:
        points = sorted(validation.items())
        panel.plot(*zip(*points, strict=True), "o-", color=COLOURS[2], markersize=4, label="validation")
    for name, value in baselines.items():
        panel.axhline(value, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
        panel.annotate(
            f"{name} {value:.2f}",
            (1, value),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            fontsize=8,
            color=INK,
        )
    panel.set_xlabel("step", fontsize=9)
    panel.set_ylabel("nats a token", fontsize=9)
    panel.set_title("Losses", fontsize=10, loc="left")
    panel.legend(frameon=False, fontsize=8)
    return drawn


def schedules(rows: Rows) -> Figure:
    """Learning rate, batch size and what else followed a schedule, a panel each."""
    present = [field for field in SCHEDULES if not np.isnan(_column(rows, field)).all()]
    drawn, panels = figure(max(1, len(present)), row_height=1.4)
    steps = _column(rows, "step")
    for panel, field in zip(panels, present, strict=False):
        panel.plot(steps, _column(rows, field), color=COLOURS[0], linewidth=1.4, marker=_marker(rows))
        panel.set_ylim(bottom=0)
        panel.set_title(SCHEDULES[field], fontsize=9, loc="left")
        panel.ticklabel_format(axis="y", scilimits=(-3, 5))
        panel.yaxis.get_offset_text().set_fontsize(8)
    panels[-1].set_xlabel("step", fontsize=9)
    return drawn


def pace(rows: Rows) -> Figure:
    """Tokens a second and gradient norm: thin each step, thick a running mean."""
    drawn, panels = figure(2, row_height=1.7)
    for panel, field, title in (
        (panels[0], "tokens_per_second", "tokens a second"),
        (panels[1], "grad_norm", "gradient norm before clipping"),
    ):
        _line(panel, rows, field, title, COLOURS[0])
        panel.set_ylim(bottom=0)
        panel.set_title(title, fontsize=9, loc="left")
    panels[-1].set_xlabel("step", fontsize=9)
    return drawn


def _line(panel: Axes, rows: Rows, field: str, label: str, colour: str) -> None:
    values, steps = _column(rows, field), _column(rows, "step")
    if np.isnan(values).all():
        return
    width = max(1, len(values) // 50)
    if width > 1:
        panel.plot(steps, values, color=colour, linewidth=0.6, alpha=0.35)
    panel.plot(
        steps, _running_mean(values, width), color=colour, linewidth=1.6, label=label, marker=_marker(rows)
    )


def _column(rows: Rows, field: str) -> NDArray[np.float64]:
    # null, and a field that a row lacks, leave a gap in the line.
    return np.array([np.nan if row.get(field) is None else row[field] for row in rows], dtype=np.float64)


def _running_mean(values: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """Mean over `width` values around each (an even width counts one more), fewer at the ends; skips gaps."""
    known = ~np.isnan(values)
    total = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0))])
    count = np.concatenate([[0.0], np.cumsum(known)])
    places = np.arange(len(values))
    low, high = np.maximum(places - width // 2, 0), np.minimum(places + width // 2 + 1, len(values))
    # Around its own step: a mean over the past alone would draw a falling loss too high.
    sums, counts = total[high] - total[low], count[high] - count[low]
    return np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)


def _marker(rows: Rows) -> str | None:
    # A line through a single point can't be seen.
    return "o" if len(rows) == 1 else None
