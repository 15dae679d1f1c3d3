"""The run directory: the recipe as given and resolved, the plugin lock, metrics, status."""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsplugins.contracts import EnvironmentUnfit

if TYPE_CHECKING:
    from dsplugins.manager import Plugins
    from dsplugins.recipe import Recipe


class RunDirectory:
    """Files of one run. Only rank 0 writes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def status(self) -> dict[str, Any] | None:
        """The last `status.json`, or None where nothing has run."""
        file = self.path / "status.json"
        return json.loads(file.read_text()) if file.exists() else None

    def same_recipe(self, recipe: Recipe) -> bool:
        """Whether the run here was made from the same resolved recipe."""
        file = self.path / "recipe.resolved.yaml"
        return file.exists() and file.read_text() == recipe.resolved()

    def start(self, recipe: Recipe, plugins: Plugins) -> None:
        """Make the folder and write what the run was started with. Raises EnvironmentUnfit if it can't."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / "recipe.yaml").write_text(recipe.as_given())
            (self.path / "recipe.resolved.yaml").write_text(recipe.resolved())
            lock = {"plugins": plugins.lock(), "versions": versions()}
            (self.path / "plugins.lock.json").write_text(json.dumps(lock, indent=1, default=str) + "\n")
            (self.path / "metrics.jsonl").write_text("")
        except OSError as error:
            raise EnvironmentUnfit(f"run.directory {self.path} can't be written: {error.strerror}") from error

    def clear(self) -> None:
        """Remove the run that is here, and nothing else."""
        ours = ("status.json", "metrics.jsonl", "recipe.yaml", "recipe.resolved.yaml", "plugins.lock.json")
        for name in (*ours, "run.json"):
            (self.path / name).unlink(missing_ok=True)
        for name in ("plots", "tensorboard"):
            shutil.rmtree(self.path / name, ignore_errors=True)

    def log(self, row: Mapping[str, Any]) -> None:
        """Append one step to `metrics.jsonl`."""
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    def end(self, code: int, reason: str, **facts: Any) -> None:
        """Write `status.json`, whole or not at all: torchrun hides exit codes, this file keeps them."""
        if not self.path.is_dir():
            return
        status = {"code": code, "reason": reason, "time": time.time(), **facts}
        partial = self.path / "status.json.partial"
        partial.write_text(json.dumps(status, indent=1) + "\n")
        os.replace(partial, self.path / "status.json")


def versions() -> dict[str, str]:
    """Versions of what a run's numbers depend on."""
    found = {"python": platform.python_version()}
    for name in ("dsplugins", "torch", "megatron-core", "transformer-engine", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
