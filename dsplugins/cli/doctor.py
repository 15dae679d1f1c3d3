"""`dsplugins doctor`: whether this machine can run recipes, and what is wrong with it."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections import Counter
from importlib import metadata

import click
from packaging.specifiers import SpecifierSet
from packaging.version import Version

NEEDED = {
    "torch": ">=2.11",
    "megatron-core": ">=0.19.2,<0.20",
    "pluggy": ">=1.7,<2",
    "omegaconf": ">=2.3.1,<3",
}


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def command(as_json: bool) -> None:
    """Look at python, torch, CUDA, megatron-core and their neighbours. Exit code 4 if something is wrong."""
    rows = [_python(), *map(_needed, NEEDED), *_torch(), _transformer_engine(), _apex(), _duplicates()]
    if as_json:
        click.echo(json.dumps(rows, indent=1))
    else:
        for row in rows:
            click.echo(f"{row['state']:<5} {row['what']:<20} {row['found']}")
            if row["remedy"]:
                click.echo(f"      {row['remedy']}")
    if any(row["state"] == "WRONG" for row in rows):
        raise SystemExit(4)


def _row(what: str, found: str, fine: bool | None, remedy: str = "") -> dict[str, str]:
    """`fine` None: absent, and that is all right."""
    state = {True: "ok", False: "WRONG", None: "-"}[fine]
    return {"what": what, "found": found, "state": state, "remedy": remedy if not fine else ""}


def _python() -> dict[str, str]:
    return _row("python", sys.version.split()[0], sys.version_info >= (3, 12), "use Python 3.12 or newer")


def _needed(name: str) -> dict[str, str]:
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return _row(name, "not installed", False, f"pip install '{name}{NEEDED[name]}'")
    fits = SpecifierSet(NEEDED[name]).contains(Version(version), prereleases=True)
    return _row(name, version, fits, f"pip install '{name}{NEEDED[name]}'")


def _torch() -> list[dict[str, str]]:
    if importlib.util.find_spec("torch") is None:
        return []
    import torch

    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = f"{devices} device(s), torch built for {torch.version.cuda or 'CPU only'}"
    return [
        _row("CUDA", found, True if devices else None, "recipes that name the plugin cpu need none"),
        _row("gloo", "in torch", torch.distributed.is_gloo_available(), "install a torch build with gloo"),
        _row("NCCL", "in torch", torch.distributed.is_nccl_available() or None, "needed by the plugin cuda"),
    ]


def _transformer_engine() -> dict[str, str]:
    try:
        return _row("transformer-engine", metadata.version("transformer-engine"), True)
    except metadata.PackageNotFoundError:
        return _row(
            "transformer-engine",
            "not installed",
            None,
            "only the plugin te needs it: pip install 'dsplugins[te]'",
        )


def _apex() -> dict[str, str]:
    """The index's package of that name is a web toolkit; megatron-core takes any `apex` for NVIDIA's."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return _row("apex", "not installed", None, "nothing needs it")
    nvidia = any(importlib.util.find_spec(f"apex.{part}") for part in ("optimizers", "normalization"))
    return _row(
        "apex",
        "NVIDIA's" if nvidia else "not NVIDIA's",
        nvidia,
        "pip uninstall apex: megatron-core misreads it",
    )


def _duplicates() -> dict[str, str]:
    names = Counter(
        (dist.metadata["Name"] or "").lower().replace("_", "-") for dist in metadata.distributions()
    )
    twice = sorted(name for name, count in names.items() if count > 1 and name)
    return _row(
        "distributions",
        f"installed twice: {', '.join(twice)}" if twice else "each once",
        not twice,
        "reinstall them",
    )
