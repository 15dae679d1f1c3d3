"""`dsplugins doctor`: whether this machine can run recipes, and what is wrong with it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib import metadata

import click
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from dsplugins.cli import machine
from dsplugins.cli.columns import columns
from dsplugins.cli.machine import row
from dsplugins.cli.waiting import waiting

EXTRAS = ("te", "hf", "data", "plot", "tensorboard")
"""Extras that a recipe may need, as opposed to those for working on dsplugins itself."""


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def command(as_json: bool) -> None:
    """Look at this machine: versions, CUDA, gloo, NCCL, packages that get in each other's way.

    Exit code 4 if something that every run needs is missing or wrong.
    """
    with waiting("importing torch and megatron-core, opening gloo"):
        rows = everything()
    wrong = [row for row in rows if row["state"] == "WRONG"]
    if as_json:
        click.echo(json.dumps(rows, indent=1))
    else:
        click.echo(columns([[row["state"], row["what"], row["found"]] for row in rows]))
        for row in rows:
            if row["remedy"]:
                click.echo(f"{row['what']}: {row['remedy']}")
    if wrong:
        raise SystemExit(4)


def everything() -> list[dict[str, str]]:
    """All that is looked at, as `machine.row`s; imports torch, opens gloo."""
    return [_python(), *_requirements(), *machine.rows()]


def _python() -> dict[str, str]:
    version = sys.version.split()[0]
    wanted = metadata.metadata("dsplugins")["Requires-Python"]
    fits = SpecifierSet(wanted).contains(version, prereleases=True)
    return row("python", version, "ok" if fits else "WRONG", f"use Python {wanted}")


def _requirements() -> Iterator[dict[str, str]]:
    """What the package declares that it needs, then what its extras need."""
    extras: dict[str, tuple[Requirement, str]] = {}
    for text in metadata.requires("dsplugins") or ():
        wanted = Requirement(text)
        if not wanted.marker or wanted.marker.evaluate({"extra": ""}):
            yield _requirement(wanted, None)
            continue
        for extra in EXTRAS:
            if wanted.marker.evaluate({"extra": extra}):
                extras[wanted.name] = (wanted, extra)
    yield from (_requirement(wanted, extra) for wanted, extra in extras.values())


def _requirement(wanted: Requirement, extra: str | None) -> dict[str, str]:
    bad, package = "-" if extra else "WRONG", f"dsplugins[{extra}]" if extra else "dsplugins"
    remedy = f"pip install '{package}'" + (f", if a recipe needs it (extra {extra})" if extra else "")
    try:
        version = metadata.version(wanted.name)
    except metadata.PackageNotFoundError:
        return row(wanted.name, "not installed", bad, remedy)
    if wanted.specifier.contains(version, prereleases=True):
        return row(wanted.name, version, "ok")
    return row(wanted.name, f"{version}, but {wanted.specifier} is needed", bad, remedy)
