"""`dsplugins explain RECIPE [KEY ...] [KEY=VALUE ...]`: each effective value and slot, and where from."""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dsplugins.contracts import Plan
    from dsplugins.manager import Plugins
    from dsplugins.recipe import Recipe


@click.command("explain")
@click.argument("recipe")
@click.argument("words", nargs=-1, metavar="[KEY]... [KEY=VALUE]...")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def command(recipe: str, words: tuple[str, ...], as_json: bool) -> None:
    """Show what RECIPE comes to: slots, then each value and who wrote it.

    A KEY shows only what is below it; KEY=VALUE overrides, as for train.
    """
    from dsplugins.contracts import RecipeError
    from dsplugins.plan import prepare
    from dsplugins.recipe import Recipe
    from dsplugins.settings import ledger

    keys = [word for word in words if "=" not in word]
    loaded = Recipe.load(recipe, [word for word in words if "=" in word])
    plugins, plan = prepare(loaded)
    book = ledger(plan, plugins, loaded)
    if book.problems:
        raise RecipeError(loaded.located(book.problems))
    rows = [*_slots(plugins), *_environment(plugins), *_sections(loaded, plan), *_options(loaded, plugins)]
    rows += [(k, _show(v), book.writers[k]) for k, v in sorted(book.values.items())]
    if keys:
        rows = _below(recipe, keys, rows)
    if as_json:
        click.echo(
            json.dumps([dict(zip(("key", "value", "origin"), row, strict=True)) for row in rows], indent=1)
        )
        return
    width = max(len(row[0]) for row in rows)
    for name, value, origin in rows:
        click.echo(f"{name:{width}}  {value}  [{origin}]")


def _below(recipe: str, keys: list[str], rows: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """The rows at `keys` and below them. UsageError for a key with none."""
    for key in keys:
        if not any(f"{row[0]}.".startswith(f"{key}.") for row in rows):
            raise click.UsageError(f"{recipe} comes to nothing called {key}")
    return [row for row in rows if any(f"{row[0]}.".startswith(f"{key}.") for key in keys)]


def _slots(plugins: Plugins) -> Iterator[tuple[str, str, str]]:
    for item in plugins:
        yield f"slot.{item.slot}", item.name, f"{item.offer.distribution} {item.offer.version}"


def _environment(plugins: Plugins) -> Iterator[tuple[str, str, str]]:
    from dsplugins.environment import declared

    for plugin, name, value in declared(plugins):
        yield f"environment.{name}", value, f"plugin {plugin}"


def _sections(recipe: Recipe, plan: Plan) -> Iterator[tuple[str, str, str]]:
    named: dict[str, Any] = {
        "parallel": plan.layout,
        "data": plan.data,
        "train": plan.train,
        "evaluate": plan.evaluate,
        "save": plan.save,
        "run": plan.run,
    }
    for section, values in named.items():
        for field in fields(values):
            if section == "parallel" and field.name == "world_size":
                continue
            key = f"{section}.{field.name}"
            given = field.name in recipe.sections.get(section, {})
            yield key, _show(getattr(values, field.name)), recipe.place(key) if given else "default"


def _options(recipe: Recipe, plugins: Plugins) -> Iterator[tuple[str, str, str]]:
    for item in plugins:
        for field in fields(item.options) if is_dataclass(item.options) else ():
            key = f"plugins.{item.name}.{field.name}"
            given = field.name in recipe.plugins[item.name]
            yield key, _show(getattr(item.options, field.name)), recipe.place(key) if given else "default"


def _show(value: Any) -> str:
    return str(value)
