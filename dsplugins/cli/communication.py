"""`dsplugins experiment communication`: what each layout sends, counted and predicted."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from dsplugins.cli.experiment_runs import folder, train_all


@click.command("communication")
@click.argument("overrides", nargs=-1)
@click.option("--steps", default=20, show_default=True, type=click.IntRange(min=4), help="Steps of each run.")
@click.option(
    "--out",
    default="docs/records",
    show_default=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for communication.json.",
)
@click.option(
    "--runs",
    "kept",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the run directories, which are then kept: called again, complete runs are not repeated.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the record instead of a table.")
def communication(
    overrides: tuple[str, ...], steps: int, out: Path, kept: Path | None, as_json: bool
) -> None:
    """Count the bytes that layouts of two processes send, beside what is predicted.

    Trains deepseek_v3/tiny_cpu.yaml for a few steps in each layout with the event bytes_on_wire; OVERRIDES
    are dot keys for all of them. Every payload that is predicted is to be the counted one, to the byte. Exit
    code 1 where it is not.
    """
    from dsplugins import records
    from dsplugins.experiments import communication as experiment

    planned = list(experiment.runs(steps, overrides))
    with folder(kept, "communication") as where:
        train_all([run for _, run in planned], where, jobs=1)
        measured = [experiment.measure(layout, where / run.name) for layout, run in planned]
    found = experiment.results(measured, steps, overrides)
    line = ["dsplugins", "experiment", "communication", "--steps", str(steps), *map(shlex.quote, overrides)]
    path = records.write(out, "communication", line, found)
    click.echo(path.read_text() if as_json else _page(found, path), nl=not as_json)
    raise SystemExit(0 if found["holds"] else 1)


def _page(found: dict[str, Any], path: Path) -> str:
    """The table and the verdict, for people."""
    from dsplugins.cli.columns import columns
    from dsplugins.experiments.communication import table

    told = f"{found['rows_predicted']} of {found['rows']} rows are predicted"
    verdict = "each to the byte" if found["holds"] else "NOT ALL AS THEY ARE COUNTED"
    ratio = f"{found['counted_over_others']:.3f} x the time of other steps (median of the layouts)"
    return "\n".join([columns(table(found)), "", f"{told}, {verdict}; counted steps take {ratio}", str(path)])
