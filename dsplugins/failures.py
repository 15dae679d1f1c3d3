"""A plugin's code raised: which plugin, in which of its functions, on which line."""

from __future__ import annotations

import os
import traceback

from dsplugins import given


class PluginFailure(RuntimeError):
    """A plugin's code raised, or made what it must not; `place` is FILE:LINE, empty where it isn't known.

    Made from one text, since megatron-core makes an error anew that it meets while it builds a module.
    """

    def __init__(self, message: str, place: str = "") -> None:
        self.place = place
        super().__init__(message)

    def said(self) -> str:
        """All of it in one line."""
        at = f" at {self.place}" if self.place else ""
        return " ".join(f"{self}{at}".split())


def failed(plugin: str, function: str, error: BaseException) -> str:
    """The sentence."""
    return f"plugin {plugin} failed in {function}: {type(error).__name__}: {error}"


class HookFailure(PluginFailure):
    """A plugin raised inside a hook, or gave what the hook can't take; the hook begins at `hook_place`."""

    def __init__(self, plugin: str, hook: str, error: BaseException, hook_place: str = "") -> None:
        super().__init__(failed(plugin, hook, error), _place(error) or hook_place)


def _place(error: BaseException) -> str:
    """The last line that ran in the plugin's own folder; the first frame is the host's call of the hook, and
    those of `given` look at what it gave."""
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__)[1:] if frame.filename != given.__file__
    ]
    if not frames:
        return ""
    folder = os.path.dirname(frames[0].filename)
    own = [frame for frame in frames if os.path.dirname(frame.filename) == folder]
    return f"{own[-1].filename}:{own[-1].lineno}"


__all__ = ["HookFailure", "PluginFailure", "failed"]
