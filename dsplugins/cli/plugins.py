"""`dsplugins plugins list` and `dsplugins plugins show NAME`."""

from __future__ import annotations

import inspect
import json
import re
import textwrap
from collections.abc import Iterator
from dataclasses import is_dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from dsplugins.offers import Offer

NAME = re.compile(r"[a-z][a-z0-9_]*")
"""What a plugin may be called: a dot would split a recipe's key."""


@click.group("plugins")
def command() -> None:
    """List installed plugins, or show one."""


@command.command("list")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def list_plugins(as_json: bool) -> None:
    """List every installed plugin, from package metadata alone: none of them is imported.

    Installed is not active: a run uses the plugins that its recipe names, and no others.
    """
    from dsplugins.cli.columns import columns

    rows = [*_rows(), *_strays()]
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    shown = ("slot", "name", "distribution", "version")
    lines = [[*(row[key] for key in shown), "; ".join(row["marks"])] for row in rows]
    click.echo(columns([["SLOT", "NAME", "DISTRIBUTION", "VERSION", ""], *lines]))


def _rows() -> Iterator[dict[str, Any]]:
    """One row an offer; `marks` says what is wrong with it, as far as metadata tells."""
    from dsplugins.offers import NoOffer, offers, qualified, resolve

    everyone = offers()
    for offer in everyone:
        marks = []
        try:
            if resolve(offer.name, everyone) != offer:
                marks.append(f"a recipe must write {qualified(offer)}: dsplugins has this name")
        except NoOffer as error:
            marks.append(f"{error}: {error.remedy}")
        if not NAME.fullmatch(offer.name):
            marks.append("not a plugin name: use a-z, 0-9 and _")
        yield {
            "slot": offer.slot,
            "name": offer.name,
            "distribution": offer.distribution,
            "version": offer.version,
            "class": offer.entry_point.value,
            "marks": marks,
        }


def _strays() -> Iterator[dict[str, Any]]:
    """Entry points in groups that look like ours but are no slot: nobody will ever find them."""
    from dsplugins.contracts import SLOTS
    from dsplugins.offers import GROUP

    known = {GROUP + slot for slot in (*SLOTS, "event")}
    for group in sorted(metadata.entry_points().groups):
        if not group.startswith(GROUP) or group in known:
            continue
        for entry in metadata.entry_points(group=group):
            yield {
                "slot": group.removeprefix(GROUP),
                "name": entry.name,
                "distribution": entry.dist.name if entry.dist else "?",
                "version": entry.dist.version if entry.dist else "?",
                "class": entry.value,
                "marks": ["there is no such slot: no recipe can name it"],
            }


@command.command("show")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def show(name: str, as_json: bool) -> None:
    """Show the plugin NAME: what it does, its options, the hooks it fills, what it asks of others."""
    facts = describe(_only(name))
    click.echo(json.dumps(facts, indent=1, default=str) if as_json else _page(facts))


def _only(name: str) -> Offer:
    from dsplugins.offers import NoOffer, offers, resolve

    try:
        return resolve(name, offers())
    except NoOffer as error:
        listed = "`dsplugins plugins list` shows what is installed"
        raise click.UsageError(f"{name}: {error}: {error.remedy}; {listed}") from None


def describe(offer: Offer) -> dict[str, Any]:
    """Everything that the plugin's class says of itself.

    Raises EnvironmentUnfit if it can't be imported, or its options can't be read.
    """
    from dsplugins.contracts import EnvironmentUnfit

    try:
        cls = offer.entry_point.load()
    except Exception as error:
        said = f"{offer.distribution} can't be imported: {type(error).__name__}: {error}"
        raise EnvironmentUnfit(said) from error
    return {
        "name": offer.name,
        "slot": offer.slot,
        "distribution": offer.distribution,
        "version": offer.version,
        "class": offer.entry_point.value,
        "about": inspect.cleandoc(cls.__doc__ or ""),
        "options": _options(cls),
        "hooks": _hooks(cls),
        "contract": getattr(cls, "contract", None),
        "requires": list(getattr(cls, "requires", ())),
        "conflicts": list(getattr(cls, "conflicts", ())),
        "env": dict(getattr(cls, "env", {})),
    }


def _hooks(cls: type) -> list[str]:
    """The hooks it fills, in the order in which a run calls them."""
    from dsplugins import hookspecs

    filled = {name for name in dir(cls) if hasattr(getattr(cls, name), "dsplugins_impl")}
    known = [name for name in vars(hookspecs) if name in filled]
    return known + sorted(filled - set(known))


def _options(cls: type) -> list[dict[str, Any]]:
    from dsplugins.cli.options import options
    from dsplugins.contracts import EnvironmentUnfit

    declared = getattr(cls, "Options", None)
    if declared is None:
        return []
    if not isinstance(declared, type) or not is_dataclass(declared):
        raise EnvironmentUnfit(f"{cls.__module__}.{cls.__name__}: its Options is not a dataclass")
    return options(declared)


def _page(facts: dict[str, Any]) -> str:
    lines = [f"{facts['name']}: {facts['slot']}, from {facts['distribution']} {facts['version']}", ""]
    lines += [facts["about"], ""] if facts["about"] else []
    if facts["options"]:
        lines.append("options:")
        for option in facts["options"]:
            needed = "needed" if option["needed"] else f"default {json.dumps(option['default'])}"
            lines.append(f"  {option['name']}: {option['type']}, {needed}")
            lines += [textwrap.indent(option["about"], "      ")] if option["about"] else []
    else:
        lines.append("options: none")
    lines.append(f"hooks: {', '.join(facts['hooks'])}")
    for key in ("requires", "conflicts"):
        lines += [f"{key}: {', '.join(facts[key])}"] if facts[key] else []
    lines += [f"env: {name}={value}" for name, value in facts["env"].items()]
    lines += [f"contract: {facts['contract']}"] if facts["contract"] else []
    return "\n".join(lines)
