"""`dsplugins experiment memory`: what a rank holds, several ways."""

from __future__ import annotations

import shlex
import tempfile
from pathlib import Path

import click


@click.command("memory")
@click.argument("overrides", nargs=-1)
@click.option(
    "--out",
    default="docs/records",
    show_default=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for memory.json.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the record instead of a table.")
def memory(overrides: tuple[str, ...], out: Path, as_json: bool) -> None:
    """Count the bytes that a rank of two holds: state, and activations of one micro-batch.

    Takes a step of deepseek_v3/tiny_cpu.yaml several ways (moments, ZeRO, layouts, micro-batch,
    recomputation); OVERRIDES are dot keys for all of them.
    """
    from dsplugins import records
    from dsplugins.cli.columns import columns
    from dsplugins.experiments import memory as experiment

    measured = []
    with tempfile.TemporaryDirectory(prefix="dsplugins-memory-") as folder:
        for way in experiment.WAYS:
            measured.append(experiment.measure(way, overrides, Path(folder)))
            click.echo(f"{way}: measured ({len(measured)} of {len(experiment.WAYS)})", err=True)
    found = experiment.results(measured, overrides)
    line = ["dsplugins", "experiment", "memory", *map(shlex.quote, overrides)]
    path = records.write(out, "memory", line, found)
    click.echo(
        path.read_text() if as_json else f"{columns(experiment.table(found))}\n\n{path}", nl=not as_json
    )
