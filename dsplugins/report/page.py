"""Facts -> the page: HTML with its pictures inside, readable without a network."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from importlib import resources
from typing import TYPE_CHECKING

import jinja2

from dsplugins.pictures import curves, history, loads

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dsplugins.report.facts import Facts


def page(facts: Facts) -> str:
    """The whole page as HTML. Needs matplotlib where there is anything to draw."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string((resources.files("dsplugins.report") / "page.html").read_text())
    pictures = [(title, _inline(drawn)) for title, drawn in _pictures(facts)]
    return template.render(facts=facts, summary=facts.summary(), looks=facts.looks(), pictures=pictures)


def _pictures(facts: Facts) -> Iterator[tuple[str, Figure]]:
    if not facts.rows:
        return
    validation = {row["step"]: row["loss"] for row in facts.evaluations}
    yield "Losses", curves.losses(facts.rows, validation, facts.run.get("baselines", {}))
    yield "Pace and gradient norm", curves.pace(facts.rows)
    yield "Schedules", curves.schedules(facts.rows)
    kept = history.logged(facts.rows)
    if len(kept):
        steps, load = kept.arrays()
        layers = _layers(facts, load.shape[1])
        yield "MaxVio", loads.max_vio(steps, load)
        yield "Expert load over time", loads.over_time(steps, load, layers)
        yield "Expert load at the end", loads.at_end(load, layers)


def _layers(facts: Facts, count: int) -> list[str]:
    """Names of the routers, as evaluations have them; numbers where nothing was evaluated."""
    names = list((facts.evaluations[-1].get("expert_load") if facts.evaluations else None) or ())
    return names if len(names) == count else [f"router {index}" for index in range(count)]


def _inline(drawn: Figure) -> str:
    """A PNG as a data address."""
    buffer = io.BytesIO()
    drawn.savefig(buffer, format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


__all__ = ["page"]
