"""`dsplugins experiment fp8`: does a model learn as well in FP8 as in BF16?"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from dsplugins.cli.experiment_runs import folder, needs_matplotlib, train_all


@click.command("fp8")
@click.argument("overrides", nargs=-1)
@click.option(
    "--steps", default=100, show_default=True, type=click.IntRange(min=10), help="Steps of each run."
)
@click.option(
    "--seeds", default=3, show_default=True, type=click.IntRange(min=1, max=10), help="Runs of each way."
)
@click.option("--peak", default=5.0e-5, show_default=True, type=float, help="Of the learning rate.")
@click.option("--jobs", default=1, show_default=True, type=click.IntRange(min=1), help="Runs side by side.")
@click.option(
    "--out",
    default="docs/records",
    show_default=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for fp8.json and fp8.png.",
)
@click.option(
    "--runs",
    "kept",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the run directories, which are then kept: called again, complete runs are not repeated.",
)
@click.option(
    "--why", is_flag=True, help="Also train the ways that explain the result, into fp8_why.json and .png."
)
@click.option("--name", help="Of the record and the picture, instead of fp8 or fp8_why.")
@click.option("--json", "as_json", is_flag=True, help="Print the record instead of a table.")
def fp8(
    overrides: tuple[str, ...],
    steps: int,
    seeds: int,
    peak: float,
    jobs: int,
    out: Path,
    kept: Path | None,
    why: bool,
    name: str | None,
    as_json: bool,
) -> None:
    """Compare what is learned in FP8 (fp8_v3), in BF16, and in BF16 from weights one ulp away.

    Trains experiments/fp8.yaml with the same seeds and data in these ways, and with --why in BF16 from
    weights as far away as E4M3 rounds them and with only some products in FP8; OVERRIDES are dot keys for all
    of them. After a fifth of the steps, smoothed losses of the twin are to stay within 0.1 % of BF16's, and
    those of FP8 within 0.25 %, on each seed. Exit code 1 where they don't.
    """
    from dsplugins import records
    from dsplugins.experiments import fp8 as experiment
    from dsplugins.experiments.fp8_plot import draw

    needs_matplotlib()
    with folder(kept, "fp8") as where:
        planned = list(experiment.runs(steps, seeds, overrides, why=why, peak=peak))
        train_all([run for _, _, run in planned], where, jobs)
        at_once, moved = experiment.direct(where), experiment.moved(where)
        measured = [experiment.measure(way, seed, where / run.name) for way, seed, run in planned]
    found = {**experiment.results(measured, steps, overrides), "direct": at_once, "moved": moved}
    named = name or ("fp8_why" if why else "fp8")
    line = ["dsplugins", "experiment", "fp8", "--steps", str(steps), "--seeds", str(seeds)]
    line += ["--peak", f"{peak:g}"] if peak != experiment.PEAK else []
    line += ["--name", name] if name else []
    asked = [*(["--why"] if why else []), *map(shlex.quote, overrides)]
    path = records.write(out, named, [*line, *asked], found)
    draw(measured, path.with_suffix(".png"))
    click.echo(path.read_text() if as_json else _page(found, path), nl=not as_json)
    raise SystemExit(0 if found["holds"] else 1)


def _way(moved: dict[str, Any]) -> str:
    learned, rounded = moved["learned_percent_of_start"], moved["rounding_percent_of_learned"]
    return f"a weight's way from its start: {learned:.1f} % of it; rounding: {rounded:.0f} % of that way"


def _page(found: dict[str, Any], path: Path) -> str:
    """Gaps, drifts and the verdict, for people."""
    from dsplugins.cli.columns import columns

    first, last = found["compared_steps"]
    until = found["floor_holds_until_step"]
    rows = [["WAY", "LARGEST GAP", f"TO STEP {until}", "LIMIT", "", "MEAN OF LAST THIRD", "95 % INTERVAL"]]
    for way, one in found["percent"].items():
        half = one["drift_half_interval"]
        interval = "-" if half is None else f"{one['drift'] - half:+.3f} to {one['drift'] + half:+.3f} %"
        verdict = {None: "", True: "holds", False: "DOES NOT HOLD"}[one["holds"]]
        gap = f"{one['largest_gap']:.3f} %"
        limit = "-" if one["limit"] is None else f"{one['limit']:g} %"
        early = f"{one['largest_gap_while_floor_holds']:.3f} %"
        rows.append([way, gap, early, limit, verdict, f"{one['drift']:+.3f} %", interval])
    verdict = "holds" if found["holds"] else "DOES NOT HOLD"
    return "\n".join(
        [
            f"relative difference from bf16, smoothed losses of steps {first} to {last}:",
            columns(rows),
            f"the floor holds to step {until}: beyond it BF16 differs from itself by more than it may",
            f"the weights of BF16, evaluated in FP8 instead: {found['direct']['percent']:+.3f} %",
            _way(found["moved"]),
            "",
            f"the claim {verdict}; {path} and {path.stem}.png beside it",
        ]
    )
