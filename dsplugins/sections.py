"""The recipe's own sections beside megatron-core's: `data`, `train`, `evaluate`, `save`, `run`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dsplugins.schedules import Schedule


@dataclass(frozen=True)
class DataOptions:
    """`data:` of a recipe: what every data plugin is asked for."""

    seq_length: int
    """Tokens a sample, S."""


@dataclass(frozen=True)
class Train:
    """`train:` of a recipe."""

    global_batch: Schedule
    """Sequences a step, over the whole cluster."""
    learning_rate: Schedule
    """Of AdamW, before any per-group multiplier."""
    micro_batch: int = 1
    """Sequences that one rank takes through the model at once, B."""
    batch_multiple: int | None = None
    """What a ramp of `global_batch` is rounded down to multiples of: itself one of micro_batch x data
    parallel. Null takes that product, so that another layout gives a ramp other steps."""
    steps: int | None = None
    """Stop after so many steps (this or `tokens`)."""
    tokens: float | None = None
    """Stop after so many tokens (this or `steps`)."""
    seed: int = 1234
    """Of weights and data order."""
    twin: bool | float = False
    """Start with other weights, but the same seed and data: true, each one unit in the last place away; a
    number, each that share of itself away, up or down. How far the losses of a run and its twin drift apart
    is the floor below which no comparison finds anything; 0.026 is what rounding to E4M3 changes."""
    log_every: int = 10
    """Steps between two printed lines; `metrics.jsonl` has every step."""
    not_finite: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is not finite stops the run, with a dump in the run directory, or costs this
    step's update only; `skip` looks at losses and all gradients before each update."""

    def multiple(self, unit: int) -> int:
        """What batches are rounded to, where `unit` is micro_batch x data parallel."""
        return self.batch_multiple or unit

    def over(self, steps: int, tokens: int) -> bool:
        """Whether no step comes after so many, of the whole run."""
        if self.steps is not None:
            return steps >= self.steps
        assert self.tokens is not None, "plan.prepare refuses a run without an end"
        return tokens >= self.tokens


@dataclass(frozen=True)
class Evaluate:
    """`evaluate:` of a recipe."""

    every: int = 0
    """Steps between two evaluations; 0 evaluates at the end only."""
    sequences: int = 64
    """Validation sequences an evaluation looks at; 0 turns evaluation off."""


@dataclass(frozen=True)
class Save:
    """`save:` of a recipe: checkpoints in the run directory. A run that is asked to stop always saves."""

    every: int = 0
    """Steps between two checkpoints; 0 counts none."""
    minutes: float = 0.0
    """Minutes between two checkpoints, by rank 0's clock; 0 counts none."""
    at_end: bool = True
    """Save after the last step."""
    keep: int = 2
    """Newest checkpoints that are kept, at least 1."""
    keep_every: int = 0
    """Checkpoints at multiples of so many steps are kept for good; 0 keeps none."""
    asynchronous: bool = True
    """Copy the state and write it while training goes on; costs this rank's share of it in host memory."""


@dataclass(frozen=True)
class RunOptions:
    """`run:` of a recipe."""

    directory: str = "runs/{recipe}"
    """Where everything of the run is kept; `{recipe}` is the recipe's name. In a Plan it is filled in."""
    world_size: int = 1
    """Processes that the layout is written for."""
    timeout_minutes: float = 30.0
    """How long a rank waits for the others in one collective before it gives the run up for hung."""


__all__ = ["DataOptions", "Evaluate", "RunOptions", "Save", "Train"]
