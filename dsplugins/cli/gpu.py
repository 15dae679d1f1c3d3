"""`dsplugins experiment gpu`: what one GPU shows, in a record."""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from dsplugins.cli.experiment_runs import folder
from dsplugins.experiments import gpu as experiment

NOTE = "asked.json"
"""What the numbers of a folder are of."""


@click.command("gpu")
@click.argument("overrides", nargs=-1)
@click.option(
    "--rounds", default=20, show_default=True, type=click.IntRange(min=1), help="Timed passes of each."
)
@click.option(
    "--part",
    "parts",
    multiple=True,
    type=click.Choice(list(experiment.PARTS)),
    help="Only this one; may be repeated. The record is then gpu_PART_PART.json.",
)
@click.option(
    "--kept",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for each part's numbers as they come: called again, what is there is not measured again.",
)
@click.option(
    "--out",
    default="docs/records",
    show_default=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for gpu.json.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the record instead of a table.")
def gpu(
    overrides: tuple[str, ...],
    rounds: int,
    parts: tuple[str, ...],
    kept: Path | None,
    out: Path,
    as_json: bool,
) -> None:
    """Time one GPU: a step beside a hand-written loop, V3's layers at full width, attention paths.

    With the backend torch_local, and with te where transformer_engine is installed. The MoE layer needs
    100 GiB. OVERRIDES are dot keys for all parts. The record is written after each, and says what is left.
    Exit code 1 if a part failed; the record says how.
    """
    from dsplugins import records
    from dsplugins.cli.columns import columns

    _needs_device(overrides)
    parts = tuple(part for part in experiment.PARTS if part in parts)
    chosen = [f"--part {part}" for part in parts]
    line = ["dsplugins", "experiment", "gpu", *map(shlex.quote, overrides), "--rounds", str(rounds), *chosen]
    ways, measured = list(experiment.ways(parts)), []
    with folder(kept, "gpu") as where:
        _begin(where, {"rounds": rounds, "overrides": list(overrides)})
        for way in ways:
            measured.append(_measured(way, overrides, rounds, where))
            found = experiment.results(measured, rounds, overrides, ways[len(measured) :])
            path = records.write(out, "_".join(["gpu", *parts]), line, found)
    click.echo(
        path.read_text() if as_json else f"{columns(experiment.table(found))}\n\n{path}", nl=not as_json
    )
    raise SystemExit(0 if found["holds"] else 1)


def _begin(where: Path, asked: dict[str, Any]) -> None:
    """Note what is measured in `where`: how, by which code, on which machine. Raises UsageError where numbers
    of another kind lie there. Commands that share a folder may begin at once.
    """
    from dsplugins import records
    from dsplugins.rundir import versions
    from dsplugins.sources import fingerprint

    code = fingerprint(Path(__file__).parents[1])
    now = asked | {"hardware": records.hardware(), "versions": versions(), "code": code}
    where.mkdir(parents=True, exist_ok=True)
    note = where / NOTE
    if not note.exists() and not any(where.glob("*.json")):
        partial = where / f"{NOTE}.{os.getpid()}"
        partial.write_text(json.dumps(now))
        os.replace(partial, note)
    before = json.loads(note.read_text()) if note.exists() else {}
    if differing := [key for key in now if before.get(key) != now[key]]:
        said = f"{where} holds numbers of another {' and '.join(differing)}"
        raise click.UsageError(f"--kept: {said}: name another folder, or remove it")


def _measured(way: experiment.Way, overrides: Sequence[str], rounds: int, where: Path) -> dict[str, Any]:
    """The numbers of `way`, told on stderr as they come."""
    began = time.monotonic()
    row = experiment.measure(way, overrides, rounds, where)
    click.echo(f"{way}: {time.monotonic() - began:.0f} s", err=True)
    for cells in experiment.lines(row):
        click.echo("  " + "  ".join(filter(None, cells[3:])), err=True)
    return row


def _needs_device(overrides: Sequence[str]) -> None:
    """Raise EnvironmentUnfit, before anything starts, where the platform lacks its device."""
    from dsplugins.contracts import EnvironmentUnfit
    from dsplugins.plan import prepare
    from dsplugins.recipe import Recipe

    way = experiment.Way("step", "torch_local")
    plugins, plan = prepare(Recipe.load(experiment.STEP, [*experiment.changes(way), *overrides]))
    for problem in plugins.slot("platform", plan=plan).problems(1):
        raise EnvironmentUnfit(f"{problem.message}: {problem.remedy}")
