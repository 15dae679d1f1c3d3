"""`dsplugins plugins list` and `show NAME`."""

from __future__ import annotations

import inspect
import json
from typing import Any

import click


@click.group("plugins")
def command() -> None:
    """List installed plugins, or show one."""


@command.command("list")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def listing(as_json: bool) -> None:
    """Every installed plugin, from package metadata alone: nothing of it is imported."""
    from dsplugins.manager import offers

    rows = [
        {
            "slot": offer.slot,
            "name": offer.name,
            "distribution": offer.distribution,
            "version": offer.version,
            "class": offer.entry_point.value,
        }
        for offer in offers()
    ]
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    for row in rows:
        click.echo(f"{row['slot']:<11} {row['name']:<16} {row['distribution']} {row['version']}")


@command.command("show")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def show(name: str, as_json: bool) -> None:
    """What NAME is: its slot, options with defaults, hooks, requirements. Imports this plugin only."""
    from dsplugins.manager import offers

    found = [offer for offer in offers() if offer.name == name]
    if not found:
        raise click.UsageError(
            f"no installed package offers a plugin called {name}; see `dsplugins plugins list`"
        )
    offer = found[0]
    cls: Any = offer.entry_point.load()
    facts = {
        "name": name,
        "slot": offer.slot,
        "distribution": f"{offer.distribution} {offer.version}",
        "about": inspect.getdoc(cls) or "",
        "contract": getattr(cls, "contract", None),
        "requires": list(getattr(cls, "requires", ())),
        "conflicts": list(getattr(cls, "conflicts", ())),
        "hooks": [key for key in dir(cls) if hasattr(getattr(cls, key), "dsplugins_impl")],
        "options": _options(cls),
    }
    if as_json:
        click.echo(json.dumps(facts, indent=1))
        return
    click.echo(f"{name}: slot {offer.slot}, from {facts['distribution']}\n\n{facts['about']}\n")
    click.echo(f"hooks: {', '.join(facts['hooks'])}")
    for key in ("contract", "requires", "conflicts"):
        if facts[key]:
            click.echo(f"{key}: {facts[key]}")
    for option in facts["options"]:
        click.echo(f"\nplugins.{name}.{option['name']} = {option['default']}\n    {option['about']}")


def _options(cls: Any) -> list[dict[str, str]]:
    from dataclasses import MISSING, fields

    from dsplugins.typed import field_docs

    options = getattr(cls, "Options", None)
    if options is None:
        return []
    docs = field_docs(options)
    return [
        {
            "name": field.name,
            "default": "(required)" if field.default is MISSING else str(field.default),
            "about": " ".join(docs.get(field.name, "").split()),
        }
        for field in fields(options)
    ]
