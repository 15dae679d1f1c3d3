"""What quantising did to a tensor, in sums that add up over micro-batches, tiles and ranks.

Imported from hook bodies only: it needs torch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from dsplugins.numerics.tiles import E4M3_MAX, Quantised, dequantise, spread

Where = tuple[str, str]
"""(module, operand)."""
HALF_UNIT = 16.0
"""Half of the distance between the largest numbers of E4M3, 416 and 448: what lies further out was cut."""


@dataclass(frozen=True)
class Errors:
    """Of one operand of one module."""

    module: str
    operand: str
    error: float
    """|x - Q(x)| / |x|, norms over all finite numbers."""
    underflow: float
    """Share of all numbers: those that became zero and were not."""
    saturation: float
    """Share that lies beyond the largest number of the format, by more than rounding: none where a scale is
    made from its tile's own largest number, as by `fp8_v3`."""
    not_finite: int
    """Numbers that are NaN or infinite, or became so."""


def sums(values: torch.Tensor, made: Quantised) -> torch.Tensor:
    """float64 [6]: |x - Q(x)|^2, |x|^2, vanished, cut, not finite, all; on the device of `values`."""
    x, y = values.detach().float(), dequantise(made)
    finite = torch.isfinite(x) & torch.isfinite(y)
    x, y = torch.where(finite, x, 0.0), torch.where(finite, y, 0.0)
    half_unit = HALF_UNIT * spread(made.scales, made.tile, x.shape)
    counted = (
        (x - y).double().square().sum(),
        x.double().square().sum(),
        ((x != 0) & (y == 0)).sum(),
        (x.abs() - E4M3_MAX / HALF_UNIT * half_unit > half_unit).sum(),
        (~finite).sum(),
        torch.tensor(x.numel()),
    )
    return torch.stack([one.to(device=x.device, dtype=torch.float64) for one in counted])


class Ledger:
    """Sums of a step, by module and operand."""

    def __init__(self) -> None:
        self._sums: dict[Where, torch.Tensor] = {}

    def add(self, module: str, operand: str, values: torch.Tensor, made: Quantised) -> None:
        """One more tensor."""
        found, where = sums(values, made), (module, operand)
        self._sums[where] = self._sums[where] + found if where in self._sums else found

    def taken(self) -> dict[Where, list[float]]:
        """What was added since the last call, as plain numbers."""
        found = {where: counted.tolist() for where, counted in self._sums.items()}
        self._sums = {}
        return found


def merged(ranks: Iterable[Mapping[Where, list[float]]]) -> list[Errors]:
    """One row for each operand of each module, over all ranks; the largest error first."""
    total: dict[Where, list[float]] = defaultdict(lambda: [0.0] * 6)
    for counted in ranks:
        for where, numbers in counted.items():
            total[where] = [a + b for a, b in zip(total[where], numbers, strict=True)]
    rows = [_errors(*where, *numbers) for where, numbers in total.items()]
    return sorted(rows, key=lambda row: (-row.error, row.module, row.operand))


def _errors(
    module: str, operand: str, off: float, whole: float, gone: float, cut: float, bad: float, count: float
) -> Errors:
    error = (off / whole) ** 0.5 if whole else 0.0
    return Errors(module, operand, error, gone / max(count, 1), cut / max(count, 1), int(bad))


def as_json(step: int, rows: Iterable[Errors]) -> dict[str, Any]:
    """What `fp8_monitor.json` holds."""
    return {"step": step, "rows": [asdict(row) for row in rows]}
