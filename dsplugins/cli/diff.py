"""`dsplugins diff RUN_A RUN_B`: how two runs were made differently."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command("diff")
@click.argument("run_a", type=click.Path(path_type=Path))
@click.argument("run_b", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def command(run_a: Path, run_b: Path, as_json: bool) -> None:
    """Compare recipe, plugins and versions of two run directories, and what was changed while they were under
    way. Exit code 0, whatever differs.
    """
    from dsplugins.changes import between, of_run, on_the_way

    made = []
    for path in (run_a, run_b):
        try:
            made.append(of_run(path) | on_the_way(path))
        except FileNotFoundError as error:
            raise click.UsageError(f"{path} holds no run: {error.filename} is missing") from error
    changes = between(*made)
    if as_json:
        click.echo(json.dumps([vars(change) for change in changes], indent=1))
    elif changes:
        click.echo("\n".join(map(str, changes)))
    else:
        click.echo("made from the same recipe, plugins and versions")
