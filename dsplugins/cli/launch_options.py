"""Options of `dsplugins launch` that can't work where the run is to start: refused, none is ignored."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import click

READ_BY = {
    "retries": ("slurm", "kubernetes"),
    "partition": ("slurm",),
    "account": ("slurm",),
    "time": ("slurm",),
    "namespace": ("kubernetes",),
    "image": ("slurm", "kubernetes"),
    "shared": ("slurm", "kubernetes"),
    "out": ("slurm", "kubernetes"),
}
"""Option -> targets that have a use for it."""
UNLIMITED = ("UNLIMITED", "INFINITE")
LABEL = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?")
"""A name as Kubernetes takes it (RFC 1123), up to 63 characters; a claim's is one or more, with dots."""
LONGEST_GRACE = 65535
"""Seconds; Slurm takes no more in --signal."""


def refuse(target: str, given: Mapping[str, Any], dry_run: bool) -> None:
    """Raise UsageError for the first option that is of no use on `target`, or that can't work there."""
    for said in (*_unused(target, given, dry_run), *_unfit(target, given)):
        raise click.UsageError(said)


def _unused(target: str, given: Mapping[str, Any], dry_run: bool) -> Iterator[str]:
    for name, targets in READ_BY.items():
        if given[name] not in (None, "") and target not in targets:
            yield f"--{name} means nothing on {target}, only on {' and '.join(targets)}: leave it out"
    if given["out"] and dry_run:
        yield "--dry-run writes nothing, so there is no file for --out: leave out one of them"


def _unfit(target: str, given: Mapping[str, Any]) -> Iterator[str]:
    if target == "slurm":
        yield from _slurm(given)
    if target == "kubernetes":
        yield from _kubernetes(given)


def _kubernetes(given: Mapping[str, Any]) -> Iterator[str]:
    claim, _, folder = given["shared"].rpartition(":")
    if not (given["image"] and claim and folder):
        yield (
            "kubernetes needs --image, which has dsplugins in it, and --shared CLAIM:FOLDER: a volume "
            "claim that all pods can write to, and the folder where they see it"
        )
        return
    if not folder.startswith("/"):
        yield f"--shared {given['shared']}: {folder} is relative, and mounts are not: name it from / on"
    named = {f"--shared {given['shared']}": claim.split("."), "--namespace": [given["namespace"]]}
    for option, labels in named.items():
        for label in filter(None, labels):
            if not LABEL.fullmatch(label) or len(label) > 63:
                said = f"{option}: {label} is no name of Kubernetes'"
                yield f"{said}, which has small letters, digits and inner hyphens, 63 at most"


def _slurm(given: Mapping[str, Any]) -> Iterator[str]:
    shared, time, grace = given["shared"], given["time"], given["grace"]
    if ":" in shared:
        yield f"--shared {shared}: a claim is Kubernetes'; under Slurm name the folder alone"
    elif shared and not given["image"]:
        yield f"--shared {shared} is mounted in a container: name its --image, or leave out --shared"
    elif shared and not shared.startswith("/"):
        yield f"--shared {shared} is relative, and mounts are not: name it from / on"
    if grace > LONGEST_GRACE:
        yield f"--grace {grace}: Slurm takes {LONGEST_GRACE} seconds at most"
    try:
        limit = seconds(time)
    except ValueError:
        yield (
            f"--time {time} is no time of Slurm's: give MINUTES, HOURS:MINUTES:SECONDS, such as 24:00:00, or "
            "DAYS-HOURS:MINUTES:SECONDS"
        )
        return
    if limit is not None and grace >= limit:
        yield (
            f"--grace {grace} is not less than --time {time}, {limit} seconds: the run would be asked to "
            "stop as soon as it starts; shorten --grace, or give it more --time"
        )


def seconds(time: str) -> int | None:
    """Of a time limit as sbatch reads it; None where there is no limit. Raises ValueError for anything else.

    `M`, `M:S`, `H:M:S`, `D-H`, `D-H:M` or `D-H:M:S`.
    """
    if not time or time.upper() in UNLIMITED:
        return None
    if not re.fullmatch(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}", time):
        raise ValueError(time)
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, left = (parts + [0, 0])[:3]
    else:
        hours, minutes, left = parts if len(parts) == 3 else [0, *parts, 0][:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + left or None


__all__ = ["refuse", "seconds"]
