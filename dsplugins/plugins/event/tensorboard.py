"""Scalars for TensorBoard."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from dsplugins.contracts import Problem, Range
from dsplugins.hookspecs import hookimpl

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch.utils.tensorboard import SummaryWriter

    from dsplugins.contracts import Evaluation, Plan, RunEnd, Settings, Step


@dataclass(frozen=True)
class TensorboardOptions:
    """Options of Tensorboard."""

    directory: str = "tensorboard"
    """Folder of the event files, inside the run directory."""
    every: Annotated[int, Range(1, None)] = 1
    """Steps between two points; evaluations are always written."""


class Tensorboard:
    """Writes the numbers of steps and evaluations for `tensorboard --logdir RUN/tensorboard`.

    Rank 0 alone writes. A resumed run hides the points that the interrupted process wrote past its
    last checkpoint.
    """

    Options = TensorboardOptions
    contract = ">=1.0,<2"
    requires: ClassVar[tuple[str, ...]] = ()
    conflicts: ClassVar[tuple[str, ...]] = ()
    env: ClassVar[Mapping[str, str]] = {}

    def __init__(self, options: TensorboardOptions) -> None:
        self._options = options
        self._folder: Path | None = None
        self._writer: SummaryWriter | None = None

    @hookimpl
    def ds_check(self, plan: Plan, settings: Settings) -> Iterator[Problem]:
        """Whether the package is here and the folder inside the run."""
        if importlib.util.find_spec("tensorboard") is None:
            yield Problem(
                "plugin tensorboard needs the package tensorboard, which is not installed",
                key="plugins.tensorboard",
                remedy="pip install 'dsplugins[tensorboard]' or plugins.tensorboard=null",
                kind="environment",
            )
        if Path(self._options.directory).is_absolute() or ".." in Path(self._options.directory).parts:
            yield Problem(
                f"plugins.tensorboard.directory={self._options.directory} leaves the run directory",
                key="plugins.tensorboard.directory",
                remedy="name a folder inside the run directory, such as tensorboard",
            )

    @hookimpl
    def ds_model_built(self, plan: Plan, chunks: Sequence[torch.nn.Module]) -> None:
        """Learn where the run is kept."""
        self._folder = Path(plan.run.directory) / self._options.directory

    @hookimpl
    def ds_step_end(self, step: Step) -> Mapping[str, Any] | None:
        """Write the step's numbers."""
        if step.step % self._options.every == 0 and _is_first_rank():
            self._write(step.step, _step_scalars(step))
        return None

    @hookimpl
    def ds_evaluated(self, evaluation: Evaluation) -> None:
        """Write the evaluation's numbers."""
        if _is_first_rank():
            named = ("loss", "mtp_loss", "mtp_acceptance")
            values = {f"validation/{name}": getattr(evaluation, name) for name in named}
            self._write(evaluation.step, values)

    @hookimpl
    def ds_run_end(self, end: RunEnd) -> None:
        """Bring everything to disk."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _write(self, step: int, scalars: Mapping[str, float | None]) -> None:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            assert self._folder is not None, "ds_model_built comes before the first step"
            self._writer = SummaryWriter(str(self._folder), purge_step=step, flush_secs=30)
        for name, value in scalars.items():
            if value is not None:
                self._writer.add_scalar(name, value, step)


def _step_scalars(step: Step) -> dict[str, float | None]:
    return {
        "train/loss": step.loss,
        "train/mtp_loss": step.mtp_loss,
        "train/aux_loss": step.aux_loss,
        "train/grad_norm": step.grad_norm,
        "train/skipped": float(step.skipped),
        "balance/max_vio": step.max_vio,
        "schedule/learning_rate": step.learning_rate,
        "schedule/global_batch": step.global_batch,
        "progress/tokens": step.tokens,
        "progress/seconds_per_step": step.seconds,
        **{f"schedule/{name}": value for name, value in step.scheduled.items()},
    }


def _is_first_rank() -> bool:
    import torch.distributed as dist

    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
