"""`dsplugins recipes`: the shipped recipes."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command("recipes")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def command(as_json: bool) -> None:
    """List the shipped recipes; `dsplugins train RECIPE` takes these names as well as paths."""
    from dsplugins.cli.columns import columns
    from dsplugins.recipe import recipe_folder

    folder = recipe_folder()
    found = [(file.relative_to(folder).as_posix(), _about(file)) for file in sorted(folder.rglob("*.yaml"))]
    if as_json:
        click.echo(json.dumps([{"recipe": name, "about": about} for name, about in found], indent=1))
        return
    if not found:
        raise click.ClickException(f"no recipes in {folder}: the installation is incomplete")
    click.echo(columns(found))


def _about(file: Path) -> str:
    """The first comment line of a recipe; empty where it starts without one."""
    first = file.read_text(encoding="utf-8").lstrip().partition("\n")[0]
    return first.lstrip("# ").rstrip() if first.startswith("#") else ""
