"""What a command is about, while nothing is to be seen yet."""

from __future__ import annotations

from contextlib import AbstractContextManager


def waiting(what: str) -> AbstractContextManager[object]:
    """Meanwhile `what` stands on the terminal; nothing where standard error is none."""
    from rich.console import Console

    return Console(stderr=True, highlight=False).status(what)


__all__ = ["waiting"]
