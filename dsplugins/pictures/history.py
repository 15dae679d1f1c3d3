"""Expert loads over a run, thinned so that a long run costs no more memory than a short one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROWS = 1024
"""More moments than a plot has columns."""

Load = NDArray[np.float32]


class LoadHistory:
    """Step -> load [L, E], as a multiple of the layer's mean; at most `ROWS` of them, evenly spread."""

    def __init__(self) -> None:
        self._loads: dict[int, Load] = {}
        self._seen, self._stride = 0, 1

    def __len__(self) -> int:
        return len(self._loads)

    def add(self, step: int, load: Load) -> None:
        """Keep this step's load, or leave it out where the history is already denser than a plot."""
        if self._seen % self._stride == 0:
            self._loads[step] = load
        self._seen += 1
        if len(self._loads) > ROWS:
            # Those at even places are the ones that twice the stride would have kept.
            self._loads = dict(list(self._loads.items())[::2])
            self._stride *= 2

    def since_start(self, rows: Iterable[Mapping[str, Any]]) -> tuple[NDArray[np.int64], Load]:
        """Steps [n] and loads [n, L, E], oldest first, with what earlier processes of this run logged.

        `rows` of `metrics.jsonl` count where they carry `expert_load` and are older than this history.
        """
        first = min(self._loads)
        shape = self._loads[first].shape
        older = {
            row["step"]: np.asarray(row["expert_load"], np.float32)
            for row in rows
            if row.get("expert_load") is not None and row["step"] < first
        }
        merged = LoadHistory()
        for step, load in (*sorted(older.items()), *self._loads.items()):
            if load.shape == shape:
                merged.add(step, load)
        return merged.arrays()

    def arrays(self) -> tuple[NDArray[np.int64], Load]:
        """Steps [n] and loads [n, L, E], oldest first, of what was added."""
        return np.array(list(self._loads)), np.stack(list(self._loads.values()))


def logged(rows: Iterable[Mapping[str, Any]]) -> LoadHistory:
    """The history of `metrics.jsonl`'s rows that carry `expert_load`; of one shape, the last one's."""
    loads = {
        row["step"]: np.asarray(row["expert_load"], np.float32)
        for row in rows
        if row.get("expert_load") is not None
    }
    history = LoadHistory()
    for step, load in loads.items():
        if load.shape == loads[max(loads)].shape:
            history.add(step, load)
    return history
