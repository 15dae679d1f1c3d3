"""What differs between two runs, or between a run and what is about to go on with it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from dsplugins import kept
from dsplugins.contracts import Problem

if TYPE_CHECKING:
    from dsplugins.manager import Plugins
    from dsplugins.recipe import Recipe

ABSENT = "absent"
REMEDY = "--accept-changes goes on with it, --fresh starts over, run.directory=... begins beside it"
"""What to do where a run would go on as another one."""
RESTORE = "put back a copy of it; to train, --fresh starts over, run.directory=... begins beside it"
"""What to do where it isn't known any more what a run was made from."""
DATA = ("tokenizer", "digest")
"""Facts of the data without which a run is another one."""
SOURCE = " (from)"
"""What the key ends with that says where a plugin comes from."""
IGNORED = ("run.directory",)
"""Where a run lies is not what it is."""


@dataclass(frozen=True)
class Change:
    """One key with two values."""

    key: str
    before: str
    now: str

    def __str__(self) -> str:
        return f"{self.key}: {self.before} -> {self.now}"

    def is_another_version(self) -> bool:
        """Whether only a plugin's package is another, or its version."""
        return self.key.endswith(SOURCE) and ABSENT not in (self.before, self.now)


def of_run(path: Path) -> dict[str, str]:
    """Everything that a run directory says of how its run was made: `key -> value`, flat.

    Raises FileNotFoundError where there is no run, RecipeError where a file of it is damaged.
    """
    resolved = _recipe(path / "recipe.resolved.yaml")
    file = path / "plugins.lock.json"
    lock = kept.mapping(file, RESTORE)
    try:
        versions = {f"versions.{name}": version for name, version in lock["versions"].items()}
        return dict(_flat(resolved)) | _sources(lock["plugins"]) | versions
    except (KeyError, TypeError, AttributeError) as error:
        raise kept.damaged(file, "is no lock of plugins and versions", RESTORE) from error


def _recipe(file: Path) -> dict[str, Any]:
    """A resolved recipe, read back."""
    try:
        found: Any = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:
        said = " ".join(str(error).split())
        raise kept.damaged(file, f"can't be read: {said}", RESTORE) from error
    if not found or not isinstance(found, dict):
        raise kept.damaged(file, "holds no recipe" if found else "is empty", RESTORE)
    return found


def on_the_way(path: Path) -> dict[str, str]:
    """What was changed while the run in `path` was under way, as it was accepted then: `key -> value`."""
    noted: dict[str, list[str]] = {}
    for row in kept.rows(path / "changes.jsonl"):
        noted.setdefault(f"changed after step {row['after_step']}", []).extend(row["changes"])
    return {key: "; ".join(changes) for key, changes in noted.items()}


def between(before: Mapping[str, str], now: Mapping[str, str]) -> list[Change]:
    """Keys whose values differ, sorted; a key that is on one side only is `absent` on the other."""
    keys = sorted({*before, *now} - set(IGNORED))
    pairs = ((key, before.get(key, ABSENT), now.get(key, ABSENT)) for key in keys)
    return [Change(key, old, new) for key, old, new in pairs if old != new]


def since(path: Path, recipe: Recipe, plugins: Plugins) -> list[Change]:
    """What of recipe and plugins has changed since the run in `path` was started.

    Versions of Python, torch and megatron-core are left out: `dsplugins diff` shows those. Raises RecipeError
    where what the run was made from is damaged or gone.
    """
    resolved: Any = OmegaConf.to_container(OmegaConf.create(recipe.resolved()), resolve=False)
    now = dict(_flat(resolved)) | _sources(plugins.lock())
    try:
        made = of_run(path)
    except FileNotFoundError as error:
        raise kept.damaged(Path(error.filename), "is gone", RESTORE) from error
    return between({key: value for key, value in made.items() if not key.startswith("versions.")}, now)


def problems(path: Path, differences: Sequence[Change], remedy: str = REMEDY) -> list[Problem]:
    """Every difference as a reason not to go on with the run in `path`."""
    return [Problem(f"{path} holds a run with another {each}", each.key, remedy) for each in differences]


def data_of(facts: Mapping[str, Any]) -> dict[str, str]:
    """What a checkpoint keeps of the data that it was trained on, from `Data.facts`."""
    return {key: str(facts[key]) for key in DATA if key in facts}


def of_data(saved: Mapping[str, str], facts: Mapping[str, Any]) -> list[Change]:
    """How the data is other than what a checkpoint kept of it; nothing where either doesn't tell."""
    now = data_of(facts)
    differing = (key for key in saved if key in now and saved[key] != now[key])
    return [Change(f"data {key}", saved[key], now[key]) for key in differing]


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _flat(inner, f"{key}.{name}" if key else str(name))
    elif key:
        yield key, json.dumps(value)


def _sources(lock: list[dict[str, Any]]) -> dict[str, str]:
    """Where each plugin comes from."""
    return {
        f"plugins.{item['name']}{SOURCE}": f"{item['distribution']} {item['version']} {item['class']}"
        for item in lock
    }


__all__ = ["ABSENT", "Change", "between", "data_of", "of_data", "of_run", "on_the_way", "problems", "since"]
