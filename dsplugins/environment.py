"""Environment variables that a recipe's plugins need (`env`): gathered, set and checked in this one place."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

from dsplugins.contracts import EnvironmentUnfit, Problem

AT_START = ("LD_", "PYTHON", "MALLOC_", "GLIBC_")
"""Variables that start so are read when a process starts: it can't set them for itself."""


class Named(Protocol):
    """A plugin with its name in the recipe: `manager.Chosen`."""

    @property
    def name(self) -> str:
        """Name in the recipe."""

    @property
    def plugin(self) -> object:
        """What may have `env`."""


def declared(chosen: Iterable[Named]) -> Iterator[tuple[str, str, str]]:
    """(plugin, variable, value) of every declaration, in recipe order."""
    for item in chosen:
        env: Mapping[str, str] = getattr(item.plugin, "env", {})
        for name, value in env.items():
            yield item.name, name, str(value)


def needed(chosen: Iterable[Named]) -> dict[str, str]:
    """Variable -> value. The manager has refused two values for one variable."""
    return {name: value for _, name, value in declared(chosen)}


def told(chosen: Iterable[Named]) -> list[str]:
    """`NAME=VALUE (plugin, plugin)`, a line a variable."""
    owners: dict[str, list[str]] = {}
    for plugin, name, value in declared(chosen):
        owners.setdefault(f"{name}={shlex.quote(value)}", []).append(plugin)
    return [f"{line} ({', '.join(plugins)})" for line, plugins in owners.items()]


def contradictions(chosen: Iterable[Named]) -> Iterator[Problem]:
    """Two plugins that want one variable to have two values."""
    first: dict[str, tuple[str, str]] = {}
    for plugin, name, value in declared(chosen):
        owner, wanted = first.setdefault(name, (plugin, value))
        if value != wanted:
            said = f"plugins.{plugin}: needs {name}={value} in the environment, {owner} needs {name}={wanted}"
            yield Problem(said, f"plugins.{plugin}", f"drop one: `{owner}: null` under plugins")


def provide(chosen: Iterable[Named]) -> None:
    """Set what is missing, for this process and those that it starts.

    Raises EnvironmentUnfit where a variable has another value already, which might be meant for something
    else, and where it is too late: torch, which reads its variables when it is imported or first used, is
    here, or the variable counts only at the start of a process.
    """
    late = "torch" in sys.modules
    for plugin, name, value in declared(chosen):
        here = os.environ.get(name)
        if here == value:
            continue
        line = f"export {name}={shlex.quote(value)}"
        if here is not None:
            raise EnvironmentUnfit(
                f"{name} is {here!r}, plugin {plugin} needs {value!r}: {line}, or unset it"
            )
        if "RANK" in os.environ and (late or name.startswith(AT_START)):
            raise EnvironmentUnfit(
                f"{name} is not set, plugin {plugin} needs {value!r}, and this rank has started without: "
                f"{line} before torchrun, or start with dsplugins launch"
            )
        os.environ[name] = value


__all__ = ["contradictions", "declared", "needed", "provide", "told"]
