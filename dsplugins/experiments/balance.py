"""Does V3's bias balance experts better than an auxiliary loss, and that better than nothing?

Three ways, the same model, seeds and data: `aux_free` with the bias alone, `aux_loss` at 1e-3, and
`aux_loss` at 0. The measure is MaxVio of arXiv 2408.15664, (max load - mean load) / mean load of a layer,
mean over all layers with experts, MTP's among them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsplugins.experiments.runs import Run, metrics, validation_loss

RECIPE = "experiments/balance.yaml"
WAYS: Mapping[str, tuple[str, ...]] = {
    "aux_free": (),
    "aux_loss": ("plugins.aux_free=null", "plugins.aux_loss.coeff=0.001"),
    "none": ("plugins.aux_free=null", "plugins.aux_loss.coeff=0.0"),
}
"""Way -> what it overrides in the recipe, which is `aux_free` as it stands."""
LIMITS = (("aux_free", "aux_loss", 0.5), ("aux_loss", "none", 0.8))
"""(a, b, limit): MaxVio of a is at most `limit` times that of b."""
MEASURES = {
    "global": "MaxVio of each expert's load summed over the last third of the steps",
    "batch": "MaxVio of each step's own batch, mean over the last third of the steps",
}


@dataclass(frozen=True)
class Measured:
    """What one run left behind."""

    way: str
    seed: int
    max_vio: dict[str, float]
    """Measure -> value, mean over layers."""
    global_per_layer: list[float]
    """[L], the measure `global` before the mean."""
    validation_loss: float
    """Nats a token."""
    curve: NDArray[np.float64]
    """[steps], MaxVio of each step's batch."""


@dataclass(frozen=True)
class Verdict:
    """One relation, on one seed or on the mean over seeds."""

    measure: str
    seed: int | str
    """A seed, or `mean`."""
    less: str
    more: str
    limit: float
    ratio: float | None
    """MaxVio of `less` over that of `more`; None where that is 0."""
    holds: bool
    """Whether MaxVio of `less` is at most `limit` times that of `more`."""


def runs(steps: int, seeds: int, overrides: Sequence[str] = ()) -> Iterator[tuple[str, int, Run]]:
    """(way, seed, run) for seeds 1 to `seeds`; `overrides` come before what the ways differ in."""
    for seed in range(1, seeds + 1):
        for way, change in WAYS.items():
            lengths = (f"train.steps={steps}", f"train.seed={seed}")
            yield way, seed, Run(f"{way}_{seed}", RECIPE, (*overrides, *lengths, *change))


def measure(way: str, seed: int, directory: Path) -> Measured:
    """The numbers of the complete run in `directory`."""
    rows = metrics(directory)
    last = rows[-window(len(rows)) :]
    per_layer = global_max_vio(
        np.array([row["expert_load"] for row in last]), np.array([row["global_batch"] for row in last])
    )
    found = {"global": float(per_layer.mean()), "batch": fmean(row["max_vio"] for row in last)}
    return Measured(
        way=way,
        seed=seed,
        max_vio={name: round(value, 4) for name, value in found.items()},
        global_per_layer=[round(value, 4) for value in per_layer.tolist()],
        validation_loss=round(validation_loss(directory), 5),
        curve=np.array([row["max_vio"] for row in rows]),
    )


def window(steps: int) -> int:
    """How many steps at the end are measured: a third, at least one."""
    return max(1, steps // 3)


def global_max_vio(loads: NDArray[np.float64], batches: NDArray[np.float64]) -> NDArray[np.float64]:
    """[L] from loads [n, L, E], multiples of each step's mean, and the n steps' batch sizes."""
    summed = np.average(loads, axis=0, weights=batches)
    return summed.max(axis=1) / summed.mean(axis=1) - 1


def judge(measured: Sequence[Measured]) -> list[Verdict]:
    """Every relation in every measure: on each seed, then on the mean over seeds."""
    seeds = sorted({one.seed for one in measured})
    labels: list[int | str] = [*seeds, "mean"]
    found = []
    for less, more, limit in LIMITS:
        for name in MEASURES:
            values = {(one.way, one.seed): one.max_vio[name] for one in measured}
            low, high = ([values[way, seed] for seed in seeds] for way in (less, more))
            found += [
                _verdict(name, seed, less, more, limit, small, large)
                for seed, small, large in zip(labels, _and_mean(low), _and_mean(high), strict=True)
            ]
    return found


def _and_mean(values: list[float]) -> list[float]:
    return [*values, fmean(values)]


def _verdict(
    name: str, seed: int | str, less: str, more: str, limit: float, small: float, large: float
) -> Verdict:
    ratio = round(small / large, 4) if large else None
    return Verdict(name, seed, less, more, limit, ratio, small <= limit * large)


def results(measured: Sequence[Measured], steps: int, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """What goes into the record."""
    verdicts = judge(measured)
    return {
        "holds": all(verdict.holds for verdict in verdicts),
        "recipe": RECIPE,
        "overrides": list(overrides),
        "ways": {way: " ".join(change) or "the recipe as it is" for way, change in WAYS.items()},
        "measures": MEASURES,
        "steps": steps,
        "measured_steps": [steps - window(steps) + 1, steps],
        "means": {way: _means([one for one in measured if one.way == way]) for way in WAYS},
        "verdicts": [asdict(verdict) for verdict in verdicts],
        "runs": [{k: v for k, v in vars(one).items() if k != "curve"} for one in measured],
    }


def _means(measured: Sequence[Measured]) -> dict[str, float]:
    """Means over seeds."""
    means = {name: round(fmean(one.max_vio[name] for one in measured), 4) for name in MEASURES}
    return {**means, "validation_loss": round(fmean(one.validation_loss for one in measured), 5)}
