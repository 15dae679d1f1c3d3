"""Collectives that end because other ranks don't join them: told as that, and not in the library's words."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

LIBRARIES = re.compile(
    r"Timed out waiting \d+ms for \w+ operation"  # gloo
    r"|Watchdog caught collective operation timeout"  # NCCL
    r"|wait timeout after \d+ms"  # the store in which ranks find each other
)
"""What they say when the time is up."""


class NoAnswer(RuntimeError):
    """This rank waited for others as long as it may. Which of them is at fault can't be seen from here."""


@contextmanager
def told(minutes: float) -> Iterator[None]:
    """Raise NoAnswer from whatever a rank ends with meanwhile because nobody answered in `minutes`."""
    try:
        yield
    except Exception as error:
        if not _timed_out(error):
            raise
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise NoAnswer(
            f"no answer from other ranks within run.timeout_minutes={minutes:g}: "
            f"a rank hangs or is gone ({first})"
        ) from error


def _timed_out(error: BaseException | None) -> bool:
    """Whether `error`, or what it was made from, says so."""
    while error is not None:
        if LIBRARIES.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


__all__ = ["NoAnswer", "told"]
