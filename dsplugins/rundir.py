"""The run directory: the recipe as given and resolved, the plugin lock, metrics, status."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import metadata
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsplugins import kept, rank
from dsplugins.contracts import EnvironmentUnfit, RecipeError

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
    ),
    *("built.json", "run.json", "bytes_on_wire.json", "fp8_monitor.json", "report.html"),
)
LOCK = "lock"
"""File that a run holds while it lasts; what is in it is for people."""
STOPPED = 75
"""Exit code of a rank that stopped early, as it was asked to: no failure."""


class Occupied(EnvironmentUnfit):
    """Another run is under way in this directory: nothing there may be written, `status.json` neither."""


class RunDirectory:
    """Files of one run. Only rank 0 writes, but for `status.json`: any rank may be the one that fails."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._opened = 0.0 if rank.has_launcher() else time.time()
        """What is older than this belongs to an earlier attempt. Our launcher has replaced that already."""

    def status(self) -> dict[str, Any] | None:
        """The last `status.json`, or None where nothing has run."""
        try:
            status: dict[str, Any] = json.loads((self.path / "status.json").read_text())
        except (OSError, ValueError):
            return None
        return status

    def begun(self) -> bool:
        """Whether a run took steps here."""
        file = self.path / "metrics.jsonl"
        return file.exists() and file.stat().st_size > 0

    def complete(self) -> bool:
        """Whether the run here reached its end, whatever has been tried since."""
        return (self.path / "run.json").exists()

    def steps(self) -> int:
        """Steps that the run here took. Raises RecipeError where their log is damaged."""
        return len(kept.rows(self.path / "metrics.jsonl"))

    def stepped_since(self, moment: float) -> bool:
        """Whether a step was taken after that time, in seconds since 1970."""
        try:
            rows = kept.rows(self.path / "metrics.jsonl")
        except RecipeError:
            return True
        return bool(rows) and rows[-1]["time"] > moment

    @contextmanager
    def held(self) -> Iterator[None]:
        """Nobody else runs here meanwhile. Ends with the process, however that ends.

        Raises Occupied while somebody does. Where the file system has no locks, nobody is refused.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / LOCK).open("a+")
        except OSError as error:
            raise self._unfit(error) from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                said = f"a run is under way in {self.path}, by {file.read() or 'another process'}"
                raise Occupied(f"{said}: stop that one, or name another run.directory") from error
            except OSError:
                yield
                return
            file.truncate(0)
            file.write(f"process {os.getpid()} of {socket.gethostname()}")
            file.flush()
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
        except OSError as error:
            raise self._unfit(error) from error
        self._announced()

    def _announced(self) -> None:
        """Replace the `status.json` of an earlier attempt: torchrun has nobody to announce a run."""
        if (self.status() or {}).get("time", 0.0) < self._opened:
            self.announce()

    def go_on(self, recipe: Recipe, plugins: Plugins, step: int, changed: Sequence[str]) -> None:
        """Rewind to `step` and note in `changes.jsonl` what is `changed` from there on.

        Raises EnvironmentUnfit if the folder can't be written.
        """
        try:
            self._rewind(step)
            if changed:
                self._append(
                    "changes.jsonl", {"time": time.time(), "after_step": step, "changes": [*changed]}
                )
            self._describe(recipe, plugins)
        except OSError as error:
            raise self._unfit(error) from error
        self._announced()

    def _describe(self, recipe: Recipe, plugins: Plugins) -> None:
        """What the run is made from."""
        self._put("recipe.yaml", recipe.as_given())
        self._put("recipe.resolved.yaml", recipe.resolved())
        lock = {"plugins": plugins.lock(), "versions": versions()}
        self._put("plugins.lock.json", json.dumps(lock, indent=1, default=str) + "\n")

    def _put(self, name: str, text: str) -> None:
        """A whole file, or the one that was there before: whoever is killed here leaves no half of one."""
        partial = self.path / f"{name}.partial"
        partial.write_text(text)
        os.replace(partial, self.path / name)

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        with (self.path / name).open("a") as file:
            file.write(json.dumps(row) + "\n")

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
        """Append one step to `metrics.jsonl`. Raises EnvironmentUnfit if that can't be done."""
        try:
            self._append("metrics.jsonl", row)
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
        return {row["step"] for row in kept.rows(self.path / "evaluations.jsonl")}

    def end(self, code: int, reason: str, *, overrule: bool = False, **facts: Any) -> dict[str, Any]:
        """Write `status.json`: torchrun hides exit codes, this file keeps them. Returns what it then holds.

        A rank whose peer is gone fails too, later. So the failure that stands there is left alone if it is
        of this attempt and of another rank, unless `overrule`.
        """
        mine = {"code": code, "reason": reason, "rank": rank.number(), **facts}
        with suppress(OSError):  # the code is still told; where nothing can be written, so is the reason
            self.path.mkdir(parents=True, exist_ok=True)
            with self._alone():
                there = self.status() or {}
                failed = (
                    there.get("code") not in (None, 0, STOPPED) and there.get("time", 0.0) >= self._opened
                )
                if failed and there.get("rank") != mine["rank"] and not overrule:
                    return there
                self._write_status(mine)
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
        self._put("status.json", json.dumps({**status, "time": time.time()}, indent=1) + "\n")

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One process at a time, where the file system has locks."""
        folder = os.open(self.path, os.O_RDONLY)
        try:
            with suppress(OSError):
                fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)

    def _unfit(self, error: OSError) -> EnvironmentUnfit:
        saved = sorted((self.path / "checkpoints").glob("step-*[0-9]"))
        goes_on = f"; make room, and the same command goes on from {saved[-1]}" if saved else ""
        return EnvironmentUnfit(f"run.directory {self.path} can't be written: {error.strerror}{goes_on}")


def _cut(file: Path, step: int) -> None:
    """Keep a log's lines up to `step`, without a last one that was not written whole."""
    rows = takewhile(lambda row: row["step"] <= step, kept.rows(file))
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
