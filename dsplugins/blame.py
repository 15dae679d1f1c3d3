"""Whose code an error came out of where no hook was called: in a module's forward, in a backward pass."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from types import FrameType
from typing import TYPE_CHECKING

from dsplugins.contracts import EnvironmentUnfit, RecipeError
from dsplugins.failures import PluginFailure, failed
from dsplugins.offers import OWN
from dsplugins.wishes import Stopped

if TYPE_CHECKING:
    from dsplugins.manager import Chosen, Plugins

SAID = (RecipeError, EnvironmentUnfit, PluginFailure, Stopped)
"""Errors that tell by themselves what is wrong, and where."""


@contextmanager
def named(plugins: Plugins) -> Iterator[None]:
    """What is raised in the code of a plugin from another package becomes a PluginFailure that names it."""
    try:
        yield
    except SAID:
        raise
    except Exception as error:
        failure = of_a_guest(error, plugins)
        if failure is None:
            raise
        raise failure from error


@contextmanager
def built_with(plugins: Plugins) -> Iterator[None]:
    """What megatron-core raises while it builds tells which parts are of other packages."""
    try:
        yield
    except Exception as error:
        if guests := plugins.guests():
            error.add_note(f"while the model was built, with parts by {', '.join(guests)}")
        raise


def of_a_guest(error: BaseException, plugins: Plugins) -> PluginFailure | None:
    """The failure of the plugin in whose package the last frame of `error` stands; None where none does."""
    owners = _owners([item for item in plugins if item.offer.distribution != OWN])
    calls = list(traceback.walk_tb(error.__traceback__))
    for index in reversed(range(len(calls))):
        frame, line = calls[index]
        if near := owners.get(_top(_module(frame))):
            frames = [called for called, _ in calls[: index + 1]]
            names = " or ".join(item.name for item in _nearest(near, frames))
            code = frame.f_code
            return PluginFailure(failed(names, code.co_qualname, error), f"{code.co_filename}:{line}")
    return None


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def _nearest(near: Sequence[Chosen], frames: Sequence[FrameType]) -> Sequence[Chosen]:
    """Which of one package's plugins it was: the one whose method is being called, or whose class has the
    last function; else those of its module; else all of them, and only then several."""
    for frame in reversed(frames):
        objects = [frame.f_locals[name] for name in frame.f_code.co_varnames[:1] if name in frame.f_locals]
        if mine := [item for item in near if any(item.plugin is one for one in objects)]:
            return mine
    module, function = _module(frames[-1]), frames[-1].f_code.co_qualname
    there = [item for item in near if item.offer.entry_point.module == module]
    return [item for item in there if item.offer.entry_point.attr == function.split(".")[0]] or there or near


def _owners(guests: Sequence[Chosen]) -> dict[str, list[Chosen]]:
    """Top-level module -> the plugins from its distribution, which may have several."""
    owners: dict[str, list[Chosen]] = {}
    installed = metadata.packages_distributions() if guests else {}
    for item in guests:
        tops = {top for top, names in installed.items() if item.offer.distribution in names}
        for top in tops | {_top(item.offer.entry_point.module)}:
            owners.setdefault(top, []).append(item)
    return owners


def _top(module: str) -> str:
    return module.split(".", 1)[0]


__all__ = ["built_with", "named", "of_a_guest"]
