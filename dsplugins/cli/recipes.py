"""`dsplugins recipes`: the shipped recipes."""

from __future__ import annotations

import json

import click


@click.command("recipes")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def command(as_json: bool) -> None:
    """List shipped recipes with the first line of their comments."""
    from dsplugins.recipe import recipe_folder

    rows = []
    for file in sorted(recipe_folder().rglob("*.yaml")):
        first = file.read_text().splitlines()[0]
        rows.append({"recipe": str(file.relative_to(recipe_folder())), "about": first.lstrip("# ")})
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    width = max(len(row["recipe"]) for row in rows)
    for row in rows:
        click.echo(f"{row['recipe']:{width}}  {row['about']}")
