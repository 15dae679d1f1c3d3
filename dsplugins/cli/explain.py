"""`dsplugins explain RECIPE [KEY ...] [KEY=VALUE ...]`: each effective value and slot, and where from."""

from __future__ import annotations

import difflib
import json
from dataclasses import asdict, fields, is_dataclass
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dsplugins.contracts import Plan
    from dsplugins.manager import Plugins
    from dsplugins.recipe import Recipe

Row = tuple[str, Any, str]
"""Dotted key, value, who wrote it."""
MANY = 1e6
"""From here on a whole number is shown as such, whatever its type."""


@click.command("explain")
@click.argument("recipe")
@click.argument("words", nargs=-1, metavar="[KEY]... [KEY=VALUE]...")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def command(recipe: str, words: tuple[str, ...], as_json: bool) -> None:
    """Show what RECIPE comes to: slots, then each value and who wrote it.

    A KEY shows only what is below it, or what megatron-core declares of a field that nobody writes; KEY=VALUE
    overrides, as for train.
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
    rows += [(key, value, book.writers[key]) for key, value in sorted(book.values.items())]
    if keys:
        rows = [row for key in keys for row in _below(recipe, key, rows)]
    if as_json:
        found = [{"key": key, "value": _plain(value), "origin": origin} for key, value, origin in rows]
        click.echo(json.dumps(found, indent=1))
        return
    width = max(len(key) for key, _, _ in rows)
    for key, value, origin in rows:
        click.echo(f"{key:{width}}  {_yaml(value)}  [{origin}]")


def _below(recipe: str, key: str, rows: list[Row]) -> list[Row]:
    """The rows at `key` and below it, or the field that nobody writes. UsageError where there is none."""
    from dsplugins.megatron_fields import SOURCES, defaults
    from dsplugins.settings import FOLLOWING

    if found := [row for row in rows if f"{row[0]}.".startswith(f"{key}.")]:
        return found
    unwritten = {f"{part}.{name}": value for part in SOURCES for name, value in defaults(part).items()}
    if key in FOLLOWING:
        return [(key, f"follows {FOLLOWING[key]}", "derived")]
    if key in unwritten:
        return [(key, unwritten[key], "declared by megatron-core")]
    near = difflib.get_close_matches(key, {*unwritten, *(row[0] for row in rows)}, n=1)
    hint = f": did you mean {near[0]}?" if near else ""
    raise click.UsageError(f"{recipe} comes to nothing called {key}{hint}")


def _slots(plugins: Plugins) -> Iterator[Row]:
    for item in plugins:
        yield f"slot.{item.slot}", item.name, f"{item.offer.distribution} {item.offer.version}"


def _environment(plugins: Plugins) -> Iterator[Row]:
    from dsplugins.environment import declared
    from dsplugins.words import Verbatim

    for plugin, name, value in declared(plugins):
        yield f"environment.{name}", Verbatim(value), f"plugin {plugin}"


def _sections(recipe: Recipe, plan: Plan) -> Iterator[Row]:
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
            yield key, getattr(values, field.name), recipe.place(key) if given else "default"


def _options(recipe: Recipe, plugins: Plugins) -> Iterator[Row]:
    for item in plugins:
        for field in fields(item.options) if is_dataclass(item.options) else ():
            key = f"plugins.{item.name}.{field.name}"
            given = field.name in recipe.plugins[item.name]
            yield key, getattr(item.options, field.name), recipe.place(key) if given else "default"


def _plain(value: Any) -> Any:
    """As JSON and YAML have it; a schedule as a recipe writes it."""
    from dsplugins.schedules import Schedule

    if isinstance(value, Schedule):
        return value.to_raw()
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value if isinstance(value, dict | str | int | float | bool | None) else str(value)


def _yaml(value: Any) -> str:
    """In one line as a recipe would have it; a schedule in words."""
    import yaml

    from dsplugins.schedules import Schedule
    from dsplugins.words import Verbatim

    if isinstance(value, Schedule | Verbatim):
        return str(value)
    if isinstance(value, float) and value.is_integer() and abs(value) >= MANY:
        return f"{value:.15g}"  # as train.tokens
    text = yaml.safe_dump(_plain(value), default_flow_style=True, width=float("inf"), sort_keys=False)
    return text.removesuffix("...\n").rstrip("\n")
