"""Does a model learn as well in FP8 as in BF16?

The same seeds and data: BF16; its twin, whose weights start one unit in the last place away; and `fp8_v3`.
The twin is the floor: nothing that differs less than BF16 from itself is a finding. The report's claim is a
relative difference of smoothed losses below 0.25 % (arXiv 2412.19437, B.1). Three more ways ask why: a rough
twin, whose weights start as far away as rounding to E4M3 takes them, tells how far a push of FP8's size takes
a run that stays in BF16; `fp8_v3` with only some of the products rounded, which rounding costs what. And the
weights that BF16 has learned, evaluated in FP8, tell what rounding costs at once, and how much of them was
learned at all.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsplugins.experiments.runs import Run, evaluated, metrics, validation_loss

RECIPE = "experiments/fp8.yaml"
BASE = "bf16"
WAYS = {
    BASE: (),
    "twin": ("train.twin=true",),
    "fp8_v3": ("plugins.bf16=null", "plugins.fp8_v3={}"),
    "rough": ("train.twin=0.026",),
    "fprop": ("plugins.bf16=null", "plugins.fp8_v3={products: [fprop]}"),
    "backward": ("plugins.bf16=null", "plugins.fp8_v3={products: [dgrad, wgrad]}"),
}
"""Way -> what it overrides in the recipe, which is `bf16` as it stands."""
LIMITS = {"twin": 0.001, "fp8_v3": 0.0025}
"""Way -> largest relative difference between its smoothed losses and those of `bf16`, after warm-up, for the
claim to hold; the other ways explain it."""
PEAK = 5.0e-5
"""Of the learning rate."""
SEQUENCES = 256
"""That `direct` looks at."""
DECAY = 0.9
"""Of the moving average that smooths losses."""
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t for a two-sided 95 % interval, 1 to 9 degrees of freedom."""


@dataclass(frozen=True)
class Measured:
    """What one run left behind."""

    way: str
    seed: int
    losses: NDArray[np.float64]
    """[steps], nats a token of each step's batch."""
    validation_loss: float
    """Nats a token, at the end."""


def runs(
    steps: int, seeds: int, overrides: Sequence[str] = (), *, why: bool = False, peak: float = PEAK
) -> Iterator[tuple[str, int, Run]]:
    """(way, seed, run) for seeds 1 to `seeds`, of all ways where it is asked `why`.

    `overrides` may replace the learning rate, never what is counted here: steps, seeds and ways.
    """
    ways = WAYS if why else {way: WAYS[way] for way in (BASE, *LIMITS)}
    schedule = f"train.learning_rate={json.dumps(learning_rate(steps, peak))}"
    for seed in range(1, seeds + 1):
        counted = (f"train.steps={steps}", f"train.seed={seed}")
        for way, change in ways.items():
            saved = ("save.at_end=true",) if (way, seed) == (BASE, 1) else ()  # for `direct`
            yield way, seed, Run(f"{way}_{seed}", RECIPE, (schedule, *overrides, *counted, *change, *saved))


def learning_rate(steps: int, peak: float = PEAK) -> list[dict[str, Any]]:
    """The recipe's schedule for `steps`: up for a fifth, level until half, down to a tenth."""
    return [
        {"until": f"{warm_up(steps)} steps", "from": 0, "to": peak},
        {"until": f"{steps // 2} steps", "value": peak},
        {"until": f"{steps} steps", "to": peak / 10, "shape": "cosine"},
    ]


def measure(way: str, seed: int, directory: Path) -> Measured:
    """The numbers of the complete run in `directory`."""
    losses = np.array([row["loss"] for row in metrics(directory)])
    return Measured(way, seed, losses, validation_loss(directory))


def direct(folder: Path) -> dict[str, Any]:
    """What FP8 costs at once: the weights of the first seed's BF16, evaluated as they are and in FP8."""
    looks = {way: (f"evaluate.sequences={SEQUENCES}", *WAYS[way]) for way in (BASE, "fp8_v3")}
    losses = {way: evaluated(folder / f"{BASE}_1", look) for way, look in looks.items()}
    percent = 100 * (losses["fp8_v3"] / losses[BASE] - 1)
    return {"seed": 1, "sequences": SEQUENCES, "validation_loss": losses, "percent": round(percent, 4)}


def moved(folder: Path) -> dict[str, Any]:
    """How far the first seed's BF16 has come, beside what rounding does, see `fp8_moved`."""
    from dsplugins.quiet import quiet

    quiet()
    from dsplugins.experiments import fp8_moved  # megatron-core, which warns while it is imported

    return fp8_moved.moved(folder / f"{BASE}_1")


def warm_up(steps: int) -> int:
    """Steps at the start that are not compared, a fifth: losses fall faster than an average follows."""
    return steps // 5


def smoothed(losses: NDArray[np.float64]) -> NDArray[np.float64]:
    """[steps], the exponential moving average that starts at the first loss."""
    average = np.empty_like(losses)
    average[0] = losses[0]
    for step in range(1, len(losses)):
        average[step] = DECAY * average[step - 1] + (1 - DECAY) * losses[step]
    return average


def gaps(measured: Sequence[Measured], way: str) -> dict[int, NDArray[np.float64]]:
    """Seed -> [steps], the relative difference of smoothed losses, `way` less `bf16`."""
    base = {one.seed: smoothed(one.losses) for one in measured if one.way == BASE}
    return {
        one.seed: (smoothed(one.losses) - base[one.seed]) / base[one.seed]
        for one in measured
        if one.way == way
    }


def drift(measured: Sequence[Measured], way: str) -> dict[str, Any]:
    """The mean signed relative difference of the losses themselves over the last third of the steps.

    By seed, their mean, and half of its 95 % interval by Student's t; None with one seed, which has none.
    """
    base = {one.seed: one.losses for one in measured if one.way == BASE}
    by_seed = {}
    for one in measured:
        if one.way == way:
            last = slice(-max(1, len(one.losses) // 3), None)
            by_seed[one.seed] = float(np.mean(one.losses[last] / base[one.seed][last] - 1))
    values, half = np.array(list(by_seed.values())), None
    if len(values) > 1:
        half = float(STUDENT[len(values) - 2] * values.std(ddof=1) / np.sqrt(len(values)))
    mean = float(values.mean())
    seen = None if half is None else abs(mean) > half
    return {"by_seed": by_seed, "mean": mean, "half_interval": half, "differs_from_zero": seen}


def results(measured: Sequence[Measured], steps: int, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """What goes into the record."""
    there = {one.way for one in measured} - {BASE}
    until = floor_until(measured, steps)
    found = {way: _compared(measured, way, steps, until) for way in WAYS if way in there}
    return {
        "holds": all(found[way]["holds"] for way in LIMITS),
        "recipe": RECIPE,
        "overrides": list(overrides),
        "ways": {way: " ".join(WAYS[way]) or "the recipe as it is" for way in (BASE, *found)},
        "steps": steps,
        "compared_steps": [warm_up(steps) + 1, steps],
        "floor_holds_until_step": until,
        "percent": found,
        "validation_loss": {
            way: {one.seed: round(one.validation_loss, 5) for one in measured if one.way == way}
            for way in (BASE, *found)
        },
        "final_loss": {
            way: {one.seed: round(float(smoothed(one.losses)[-1]), 5) for one in measured if one.way == way}
            for way in (BASE, *found)
        },
    }


def floor_until(measured: Sequence[Measured], steps: int) -> int:
    """The last step up to which, after warm-up, the twin of every seed stays within its limit.

    What a way does beyond it tells nothing: there BF16 differs from itself by as much.
    """
    outside = [~(np.abs(gap[warm_up(steps) :]) < LIMITS["twin"]) for gap in gaps(measured, "twin").values()]
    lost = np.logical_or.reduce(outside)
    return warm_up(steps) + int(lost.argmax()) if lost.any() else steps


def _compared(measured: Sequence[Measured], way: str, steps: int, until: int) -> dict[str, Any]:
    """Largest gap by seed, over all, and while the floor holds; the limit, and the drift.

    All in percent of the loss of `bf16`.
    """
    after = {seed: np.abs(gap[warm_up(steps) :]) for seed, gap in gaps(measured, way).items()}
    largest = {seed: float(gap.max()) for seed, gap in after.items()}
    while_floor = [float(gap[: until - warm_up(steps)].max(initial=0.0)) for gap in after.values()]
    drifted = drift(measured, way)
    return {
        "limit": 100 * LIMITS[way] if way in LIMITS else None,
        "largest_gap": round(100 * max(largest.values()), 4),
        "largest_gap_by_seed": {seed: round(100 * gap, 4) for seed, gap in largest.items()},
        "holds": max(largest.values()) < LIMITS[way] if way in LIMITS else None,
        "largest_gap_while_floor_holds": round(100 * max(while_floor), 4),
        "drift": round(100 * drifted["mean"], 4),
        "drift_by_seed": {seed: round(100 * value, 4) for seed, value in drifted["by_seed"].items()},
        "drift_half_interval": None
        if drifted["half_interval"] is None
        else round(100 * drifted["half_interval"], 4),
        "drift_differs_from_zero": drifted["differs_from_zero"],
    }
