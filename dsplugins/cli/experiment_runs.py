"""What the commands of `dsplugins experiment` share: a folder for their runs, and training all of them."""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from dsplugins.experiments.runs import Run


@contextmanager
def folder(kept: Path | None, name: str) -> Iterator[Path]:
    """The folder that was asked for, or one that is gone at the end."""
    if kept is not None:
        yield kept
        return
    with tempfile.TemporaryDirectory(prefix=f"dsplugins-{name}-") as temporary:
        yield Path(temporary)


def needs_matplotlib() -> None:
    """Raise EnvironmentUnfit before anything is trained for a picture that can't be drawn."""
    from dsplugins.contracts import EnvironmentUnfit

    if importlib.util.find_spec("matplotlib") is None:
        raise EnvironmentUnfit(
            "the picture needs matplotlib, which is not installed: pip install 'dsplugins[plot]'"
        )


def train_all(runs: Sequence[Run], where: Path, jobs: int) -> None:
    """Train whatever is to be trained, and tell on stderr how far it is. A failed run's code becomes ours."""
    from dsplugins.experiments.runs import RunFailed, execute

    began, done = time.monotonic(), []

    def tell(run: Run) -> None:
        done.append(run)
        passed = time.monotonic() - began
        click.echo(f"{run.name}: trained ({len(done)} of {len(runs)} runs, {passed:.0f} s)", err=True)

    try:
        execute(runs, where, jobs, tell)
    except RunFailed as error:
        click.echo(str(error), err=True)
        raise SystemExit(error.code) from None
