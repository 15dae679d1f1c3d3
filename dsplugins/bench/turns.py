"""Two things timed in turn, so that a machine whose speed drifts slows both alike."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Timed:
    """Seconds a step of two contestants, round by round."""

    first: Sequence[float]
    second: Sequence[float]

    @property
    def ratio(self) -> float:
        """First over second: ratio of the medians."""
        return statistics.median(self.first) / statistics.median(self.second)

    def results(self, names: tuple[str, str]) -> dict[str, object]:
        """What a record holds."""
        paired = [a / b for a, b in zip(self.first, self.second, strict=True)]
        return {
            "rounds": len(self.first),
            f"{names[0]}_seconds_median": statistics.median(self.first),
            f"{names[1]}_seconds_median": statistics.median(self.second),
            "ratio_of_medians": self.ratio,
            "median_of_paired_ratios": statistics.median(paired),
            f"{names[0]}_seconds": list(self.first),
            f"{names[1]}_seconds": list(self.second),
        }


def in_turn(first: Callable[[], float], second: Callable[[], float], rounds: int) -> Timed:
    """`rounds` times both, each of which returns the seconds it took; who begins changes every round."""
    pairs = []
    for number in range(rounds):
        if number % 2:
            later = second()
            pairs.append((first(), later))
        else:
            pairs.append((first(), second()))
    return Timed([a for a, _ in pairs], [b for _, b in pairs])


__all__ = ["Timed", "in_turn"]
