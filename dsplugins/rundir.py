"""The run directory: the recipe as given and resolved, the plugin lock, metrics, status."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import platform
import shutil
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib import metadata
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsplugins import kept, rank, run_lock
from dsplugins.contracts import EnvironmentUnfit, RecipeError
from dsplugins.run_lock import Occupied

if TYPE_CHECKING:
    from dsplugins.manager import Plugins
    from dsplugins.recipe import Recipe

FILES = (
    *(
        "metrics.jsonl",
        "evaluations.jsonl",
        "recipe.yaml",
        "recipe.resolved.yaml",
        "plugins.lock.json",
        "changes.jsonl",
        "attempts.jsonl",
        "crashes",
    ),
    *("built.json", "saved.json", "run.json", "bytes_on_wire.json", "fp8_monitor.json", "report.html"),
)
STOPPED = 75
"""Exit code of a rank that stopped early, as it was asked to: no failure."""


class RunDirectory:
    """Files of one run. Only rank 0 writes, but for `status.json`: any rank may be the one that fails."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._before = None if rank.has_launcher() else self._mark()
        """The `status.json` of an earlier attempt, which our launcher has replaced already. Known by itself:
        clocks of other machines are not asked."""
        self._announced_as: tuple[int, int] | None = None
        """The `status.json` of this one, as `announce` left it."""
        self._logged: int | None = None
        """Bytes of `metrics.jsonl` after this run's last row there."""

    def _mark(self) -> tuple[int, int] | None:
        """What tells one `status.json` from the next: each is a file of its own. None where there is none.

        Opened, since a network's file system asks its server then.
        """
        try:
            with (self.path / "status.json").open() as file:
                found = os.fstat(file.fileno())
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns

    def status(self) -> dict[str, Any] | None:
        """The last `status.json`, or None where nothing has run."""
        try:
            status: dict[str, Any] = json.loads((self.path / "status.json").read_text())
        except (OSError, ValueError):
            return None
        return status

    def verdict(self) -> dict[str, Any] | None:
        """`status.json` as this attempt wrote it; None as long as it hasn't."""
        return self.status() if rank.has_launcher() or self._mark() != self._before else None

    def begun(self) -> bool:
        """Whether a run took steps here; a checkpoint tells that of a run whose log is gone, too."""
        file = self.path / "metrics.jsonl"
        logged = file.exists() and file.stat().st_size > 0
        return logged or bool(self._checkpoints())

    def _checkpoints(self) -> list[Path]:
        """Finished ones, the newest last."""
        return sorted((self.path / "checkpoints").glob("step-*[0-9]"))

    def complete(self) -> bool:
        """Whether the run here reached its end, whatever has been tried since."""
        return (self.path / "run.json").exists()

    def steps(self) -> int:
        """Steps that the run here took. Raises RecipeError where their log is damaged."""
        rows = kept.steps(self.path / "metrics.jsonl")
        return int(rows[-1]["step"]) if rows else 0

    def saved(self) -> int | None:
        """The step of the last checkpoint that was finished here, wherever that may be now."""
        try:
            return int(kept.mapping(self.path / "saved.json")["step"])
        except (FileNotFoundError, RecipeError, KeyError, TypeError, ValueError):
            return None

    def stepped_since(self, moment: float) -> bool:
        """Whether a step was taken after that time, in seconds since 1970."""
        try:
            rows = kept.steps(self.path / "metrics.jsonl")
        except RecipeError:
            return True
        return bool(rows) and rows[-1].get("time", math.inf) > moment

    @contextmanager
    def held(self) -> Iterator[None]:
        """Nobody else runs here meanwhile, see `run_lock.held`. Raises Occupied while somebody does."""
        with ExitStack() as stack:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                stack.enter_context(run_lock.held(self.path))
            except OSError as error:
                raise self._unfit(error) from error
            yield

    def announce(self) -> None:
        """Make the folder, and replace an old `status.json`: a run that dies without a word has code null.

        Raises EnvironmentUnfit if the folder can't be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._write_status({"code": None, "reason": "running, or gone without a word"})
        except OSError as error:
            raise self._unfit(error) from error
        self._announced_as = self._mark()

    def lost(self) -> bool:
        """Whether another run has announced itself here since this one; it may where nothing is locked."""
        status = self.status() or {}
        return self._mark() != self._announced_as and "code" in status and status["code"] is None

    def start(self, recipe: Recipe, plugins: Plugins, fresh: bool = False) -> None:
        """Clear what an earlier run left, and write what this one was started with.

        Dumps of numbers that weren't finite are wanted after such a run, and go only if it is to be `fresh`.
        Raises EnvironmentUnfit if the folder can't be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._clear(fresh)
            self._describe(recipe, plugins)
            (self.path / "metrics.jsonl").write_text("")
            self._attempted(after_step=0)
        except OSError as error:
            raise self._unfit(error) from error
        self._announced()

    def _announced(self) -> None:
        """Replace the `status.json` of an earlier attempt: torchrun has nobody to announce a run."""
        if not rank.has_launcher() and self._mark() == self._before:
            self.announce()

    def _attempted(self, **facts: Any) -> None:
        """One start or one end of this run, for `attempts.jsonl`: `status.json` has the last one only."""
        self._append("attempts.jsonl", {"time": time.time(), "host": socket.gethostname(), **facts})

    def go_on(self, recipe: Recipe, plugins: Plugins, step: int, changed: Sequence[str]) -> list[str]:
        """Rewind to `step` and note in `changes.jsonl` what is `changed` from there on; what is to be told.

        Raises EnvironmentUnfit if the folder can't be written.
        """
        try:
            self._rewind(step)
            if changed:
                self._append(
                    "changes.jsonl", {"time": time.time(), "after_step": step, "changes": [*changed]}
                )
            self._describe(recipe, plugins)
            self._attempted(after_step=step)
        except OSError as error:
            raise self._unfit(error) from error
        self._announced()
        return self._gaps(step)

    def _gaps(self, step: int) -> list[str]:
        """Steps up to `step` that `metrics.jsonl` doesn't have."""
        there = {row["step"] for row in kept.steps(self.path / "metrics.jsonl")}
        missing = sorted({*range(1, step + 1)} - there)
        if not missing:
            return []
        lost = f"{len(missing)} of {step} steps, the first {missing[0]}, the last {missing[-1]}"
        return [f"{self.path / 'metrics.jsonl'} has no row for {lost}: lost, and not taken again"]

    def _describe(self, recipe: Recipe, plugins: Plugins) -> None:
        """What the run is made from."""
        self._put("recipe.yaml", recipe.as_given())
        self._put("recipe.resolved.yaml", recipe.resolved())
        lock = {"plugins": plugins.lock(), "versions": versions()}
        self._put("plugins.lock.json", json.dumps(lock, indent=1, default=str) + "\n")

    def _put(self, name: str, text: str, by: str = "") -> None:
        """A whole file, or the one that was there before: whoever is killed here leaves no half of one.

        `by` keeps apart those who may write it at the same time.
        """
        partial = self.path / f"{name}{by}.partial"
        partial.write_text(text)
        os.replace(partial, self.path / name)

    def _append(self, name: str, row: Mapping[str, Any], after: int | None = None) -> int:
        """Where the file ends then, in bytes. Raises Occupied where it no longer ends at `after`."""
        with (self.path / name).open("ab") as file:
            if after not in (None, file.tell()):
                said = f"{self.path / name} isn't as this run left it: another run writes there"
                raise Occupied(f"{said}, or somebody has changed it; one run at a time in a run.directory")
            file.write(json.dumps(row).encode() + b"\n")
            return file.tell()

    def _clear(self, dumps: bool) -> None:
        """Remove the run that is here, and nothing else."""
        for name in FILES:
            (self.path / name).unlink(missing_ok=True)
        for name in ("plots", "tensorboard", "calls", *(["not_finite"] if dumps else [])):
            shutil.rmtree(self.path / name, ignore_errors=True)

    def _rewind(self, step: int) -> None:
        """Forget what was logged after `step`."""
        for name in ("metrics.jsonl", "evaluations.jsonl"):
            _cut(self.path / name, step)
        (self.path / "run.json").unlink(missing_ok=True)

    def note(self, name: str, facts: Mapping[str, Any]) -> None:
        """Write a JSON file of the run. Raises EnvironmentUnfit if that can't be done."""
        try:
            self._put(name, json.dumps(facts, indent=1) + "\n")
        except OSError as error:
            raise self._unfit(error) from error

    def log(self, row: Mapping[str, Any]) -> None:
        """Append one step to `metrics.jsonl`.

        Raises EnvironmentUnfit if that can't be done, Occupied where somebody else has written there.
        """
        try:
            self._logged = self._append("metrics.jsonl", row, after=self._logged)
        except OSError as error:
            raise self._unfit(error) from error

    def secure(self) -> None:
        """Have the steps so far on disk, where a checkpoint that counts them is about to be.

        Raises EnvironmentUnfit if that can't be done.
        """
        try:
            with (self.path / "metrics.jsonl").open("ab") as file:
                os.fsync(file.fileno())
        except OSError as error:
            raise self._unfit(error) from error

    def log_evaluation(self, row: Mapping[str, Any]) -> None:
        """Append one evaluation to `evaluations.jsonl`. Raises EnvironmentUnfit if that can't be done."""
        try:
            self._append("evaluations.jsonl", row)
        except OSError as error:
            raise self._unfit(error) from error

    def evaluated(self) -> set[int]:
        """Steps that `evaluations.jsonl` has."""
        return {row["step"] for row in kept.steps(self.path / "evaluations.jsonl")}

    def end(self, code: int, reason: str, *, overrule: bool = False, **facts: Any) -> dict[str, Any]:
        """Write `status.json`: torchrun hides exit codes, this file keeps them. Returns what it then holds.

        A rank whose peer is gone fails too, later. So the failure that stands there is left alone if it is
        of this attempt and of another rank, unless `overrule`.
        """
        mine = {"code": code, "reason": reason, "rank": rank.number(), **facts}
        with suppress(OSError):  # the code is still told; where nothing can be written, so is the reason
            self.path.mkdir(parents=True, exist_ok=True)
            with self._alone():
                there = self.verdict() or {}
                failed = there.get("code") not in (None, 0, STOPPED)
                if failed and there.get("rank") != mine["rank"] and not overrule:
                    return there
                self._write_status(mine)
                self._attempted(**mine)
        return mine

    def keep_calls(self, text: str) -> Path | None:
        """Leave the traceback of this rank's failure in `calls/rank-N.txt`; None where that can't be."""
        try:
            (self.path / "calls").mkdir(parents=True, exist_ok=True)
            name = f"calls/rank-{rank.number() or 0}.txt"
            self._put(name, text)
        except OSError:  # the failure itself is told all the same
            return None
        return self.path / name

    def _write_status(self, status: Mapping[str, Any]) -> None:
        """Whole or not at all."""
        text = json.dumps({**status, "time": time.time()}, indent=1) + "\n"
        self._put("status.json", text, by=f".{rank.number()}")

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One process at a time, where there are locks; NFS has them for files open for writing only."""
        with (self.path / "status.lock").open("a") as file:
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _unfit(self, error: OSError) -> EnvironmentUnfit:
        saved = self._checkpoints()
        goes_on = f"; {remedy(str(error))}, and the same command goes on from {saved[-1]}" if saved else ""
        return EnvironmentUnfit(f"run.directory {self.path} can't be written: {error.strerror}{goes_on}")


def remedy(said: str) -> str:
    """What helps where a file can't be written, by what the system said."""
    full = any(os.strerror(code) in said for code in (errno.ENOSPC, errno.EDQUOT))
    return "make room" if full else "mend that"


def _cut(file: Path, step: int) -> None:
    """Keep a log's lines up to `step`, without a last one that was not written whole."""
    rows = takewhile(lambda row: row["step"] <= step, kept.steps(file))
    partial = file.with_name(f"{file.name}.partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.replace(partial, file)


DRIVER = Path("/sys/module/nvidia/version")
"""Where Linux tells the version of NVIDIA's driver, if it is there."""


def versions() -> dict[str, str]:
    """Versions of what a run's numbers depend on; the driver's where there is one."""
    found = {"python": platform.python_version()}
    for name in ("dsplugins", "torch", "megatron-core", "transformer-engine", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    with suppress(OSError):
        found["driver"] = DRIVER.read_text().strip()
    return found
