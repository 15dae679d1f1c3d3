"""What a run directory says of its run, as the page shows it. One under way, or failed, has less."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from dsplugins import kept
from dsplugins.pictures.style import read_evaluations, read_metrics
from dsplugins.words import duration, size

BEING_WRITTEN = ".partial"
"""How the name of a checkpoint ends that is half written, or half removed."""


@dataclass(frozen=True)
class Facts:
    """Everything that is read once; each field is empty where the run has no such file yet."""

    directory: Path
    resolved: str
    """`recipe.resolved.yaml`."""
    lock: Mapping[str, Any]
    built: Mapping[str, Any]
    run: Mapping[str, Any]
    """`run.json`, of a run that is complete."""
    status: Mapping[str, Any]
    rows: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    changes: list[dict[str, Any]]
    checkpoints: list[str]
    """Those that count, and those that were found damaged, under a name that says so."""
    dumps: list[str]
    """Folders of `not_finite/`."""

    @property
    def state(self) -> str:
        """`complete`, `running, or gone without a word`, or what ended it, with the code."""
        code, reason = self.status.get("code"), self.status.get("reason", "no status.json")
        return str(reason) if code in (None, 0) else f"{reason} (exit code {code})"

    def summary(self) -> dict[str, str]:
        """Name -> value of what somebody looks for first."""
        shown = {"state": self.state}
        if self.rows:
            last, skipped = self.rows[-1], sum(bool(row["skipped"]) for row in self.rows)
            seconds = sum(row["step_seconds"] for row in self.rows)
            shown |= {
                "steps": f"{last['step']:,}" + (f", {skipped} of them skipped" if skipped else ""),
                "tokens": f"{last['tokens']:,}",
                "time in steps": duration(seconds),
                "tokens a second": f"{median(row['tokens_per_second'] for row in self.rows):,.0f} (median)",
                "last training loss": _number(last["loss"]),
            }
        if self.run.get("peak_memory"):
            shown["peak memory of rank 0"] = size(self.run["peak_memory"])
        if self.run.get("memory"):
            parts = (f"{name.replace('_', ' ')} {size(count)}" for name, count in self.run["memory"].items())
            shown["state of a rank, at most"] = ", ".join(parts)
        return shown | {name: str(value) for name, value in self.built.items() if isinstance(value, str)}

    def looks(self) -> list[dict[str, str]]:
        """Evaluations as rows of text."""
        return [
            {
                "step": str(row["step"]),
                "loss": _number(row["loss"]),
                "bits per byte": _number(row.get("bits_per_byte")),
                "MTP loss": _number(row.get("mtp_loss")),
                "MTP acceptance": _share(row.get("mtp_acceptance")),
                "MaxVio": _number(row.get("max_vio")),
                "sequences": str(row["sequences"]),
            }
            for row in self.evaluations
        ]


def read(directory: Path) -> Facts:
    """The facts of a run. Raises FileNotFoundError where there is no run, RecipeError for a damaged file."""
    return Facts(
        directory=directory,
        resolved=(directory / "recipe.resolved.yaml").read_text(errors="replace"),
        lock=_json(directory / "plugins.lock.json"),
        built=_json(directory / "built.json"),
        run=_json(directory / "run.json"),
        status=_json(directory / "status.json"),
        rows=read_metrics(directory),
        evaluations=read_evaluations(directory),
        changes=kept.rows(directory / "changes.jsonl"),
        checkpoints=[
            path.name
            for path in sorted(directory.glob("checkpoints/step-*"))
            if not path.name.endswith(BEING_WRITTEN)
        ],
        dumps=[path.name for path in sorted(directory.glob("not_finite/step-*"))],
    )


def _json(path: Path) -> dict[str, Any]:
    return (
        kept.mapping(path, "put back a copy of it, or move it away: then the page is made without")
        if path.exists()
        else {}
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.5g}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


__all__ = ["Facts", "read"]
