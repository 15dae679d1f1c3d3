"""What was sent beside what was predicted: one row for each kind of collective in each group."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dsplugins.plugins.event.wire.tally import Key, Traffic

Report = tuple[Mapping[Key, Traffic], Mapping[Key, float]]
"""One rank's step: what it counted, and the payloads that were predicted for it."""


@dataclass(frozen=True)
class Row:
    """Traffic of one kind in one group: means over the measured steps."""

    kind: str
    group: str
    calls: float
    """Of a rank in a step; mean over the ranks, as all that follow but for the maximum."""
    payload: float
    """Bytes."""
    predicted: float | None
    """Payload that the recipe's sizes come to; None where nobody could tell."""
    sent: float
    """Bytes that leave a rank."""
    sent_max: float
    """Of the rank that sends most."""


class Table:
    """Sums of the measured steps, on rank 0."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self._counted: list[dict[Key, Traffic]] = []
        self._predicted: dict[Key, float] = defaultdict(float)

    def add(self, step: int, reports: Sequence[Report]) -> None:
        """One step, as all ranks report it."""
        self._counted = self._counted or [defaultdict(Traffic) for _ in reports]
        self.steps.append(step)
        for mine, (counted, predicted) in zip(self._counted, reports, strict=True):
            for key, traffic in counted.items():
                mine[key].add(traffic)
            for key, payload in predicted.items():
                self._predicted[key] += payload

    def rows(self) -> list[Row]:
        """By bytes that leave a rank, most first; what was predicted and never seen is there, too."""
        keys = {key for mine in self._counted for key in mine} | set(self._predicted)
        rows = [self._row(key) for key in keys]
        return sorted(rows, key=lambda row: (-row.sent, -row.payload, row.kind, row.group))

    def _row(self, key: Key) -> Row:
        ranks, steps = len(self._counted), len(self.steps)
        found = [mine.get(key, Traffic()) for mine in self._counted]
        predicted = self._predicted.get(key)
        return Row(
            kind=key.kind,
            group=key.group,
            calls=sum(each.calls for each in found) / ranks / steps,
            payload=sum(each.payload for each in found) / ranks / steps,
            predicted=None if predicted is None else predicted / ranks / steps,
            sent=sum(each.sent for each in found) / ranks / steps,
            sent_max=max(each.sent for each in found) / steps,
        )

    def as_json(self) -> dict[str, Any]:
        """What `bytes_on_wire.json` holds."""
        return {
            "steps": self.steps,
            "ranks": len(self._counted),
            "rows": [asdict(row) for row in self.rows()],
        }

    def lines(self) -> Iterator[tuple[str, str]]:
        """(`all_to_all in expert`, what is said of it) for people."""
        for row in self.rows():
            most = f", {_bytes(row.sent_max)} at most" if row.sent_max > row.sent else ""
            sent = f"{_bytes(row.sent)} sent{most}"
            payload = f"payload {_bytes(row.payload)}, {_compared(row)}"
            yield f"{row.kind} in {row.group}", f"{row.calls:g} calls, {sent}; {payload}"


def totals(reports: Sequence[Report]) -> dict[str, float]:
    """What goes to `metrics.jsonl`: mean and maximum over the ranks, all kinds and groups together."""
    sent = [sum(traffic.sent for traffic in counted.values()) for counted, _ in reports]
    calls = [sum(traffic.calls for traffic in counted.values()) for counted, _ in reports]
    return {"wire_bytes": sum(sent) / len(sent), "wire_bytes_max": max(sent), "wire_calls": max(calls)}


def _compared(row: Row) -> str:
    if row.predicted is None:
        return "not predicted"
    if row.predicted == row.payload:
        return "as predicted"
    return f"predicted {_bytes(row.predicted)}"


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.4g} {unit}"
