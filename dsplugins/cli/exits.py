"""Exit codes, and how an error becomes one."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

CODES = {
    0: "done",
    1: "crashed",
    2: "usage",
    3: "recipe invalid",
    4: "environment not fit",
    75: "stopped early, with a checkpoint if it took a step: run the same command again",
}
DEBUG = "DSPLUGINS_DEBUG"
"""Environment variable behind `--debug`: the ranks that a run starts inherit it."""


def debug() -> None:
    """From now on, in this process and those it starts, plugin failures come with their traceback."""
    os.environ[DEBUG] = "1"


def guarded(call: Callable[[], Any]) -> None:
    """Run `call`; what goes wrong becomes a message on stderr and its exit code.

    A fault of the recipe or the machine is the same on every rank: the first one of each machine tells it.
    A crash is told by the rank that it happened on.
    """
    try:
        call()
    except SystemExit as end:
        if end.code == 2:
            _tell_launch(2, "usage: its output says what of it")
        raise
    except Exception as error:
        _tell_launch(code_of(error), reason_of(error), error)
        speaks = code_of(error) == 1 or os.environ.get("LOCAL_RANK", "0") == "0"
        leave(code_of(error), message_of(error) if speaks else "")


def _tell_launch(code: int, reason: str, error: Exception | None = None) -> None:
    """Leave the code in `status.json`, as a run does: torchrun makes 1 of every code."""
    from dsplugins.rank import RUN
    from dsplugins.rundir import Occupied, RunDirectory

    if RUN in os.environ and not isinstance(error, Occupied):
        RunDirectory(Path(os.environ[RUN])).end(code, reason)


def code_of(error: BaseException) -> int:
    """The exit code that an error stands for: 3, 4, 75 or 1."""
    from dsplugins.contracts import EnvironmentUnfit, RecipeError
    from dsplugins.wishes import Stopped

    if isinstance(error, Stopped):
        return 75
    if isinstance(error, RecipeError):
        return 4 if all(problem.kind == "environment" for problem in error.problems) else 3
    return 4 if isinstance(error, EnvironmentUnfit) else 1


def message_of(error: Exception, calls: Path | None = None) -> str:
    """What a person is told: every problem, or one line for a plugin's failure, or where we crashed.

    `calls` is the file that holds the traceback, if there is one.
    """
    from dsplugins.contracts import EnvironmentUnfit, RecipeError
    from dsplugins.failures import PluginFailure
    from dsplugins.wishes import Stopped

    if isinstance(error, Stopped):
        return str(error)
    if isinstance(error, RecipeError):
        from dsplugins.recipe import render

        if code_of(error) == 4:
            parts = ((p.place, p.message, p.remedy) for p in error.problems)
            return "\n".join(": ".join(filter(None, three)) for three in parts)
        ended = "No step was taken." if "RANK" in os.environ else "Nothing was started."
        return render(error.problems, ended)
    if isinstance(error, EnvironmentUnfit):
        return f"this machine can't run it: {error}"
    if isinstance(error, PluginFailure) and DEBUG not in os.environ:
        shown = f"all calls: {calls}" if calls else "dsplugins --debug shows the calls"
        return f"{reason_of(error)} ({shown})"
    return f"{calls_of(error)}{_rank()}{error}"


def calls_of(error: BaseException) -> str:
    """The whole traceback, with those of its causes."""
    return "".join(traceback.format_exception(error))


def reason_of(error: BaseException) -> str:
    """The same in one line, as `status.json` holds it."""
    from dsplugins.contracts import EnvironmentUnfit, RecipeError
    from dsplugins.failures import PluginFailure
    from dsplugins.unanswered import NoAnswer
    from dsplugins.wishes import Stopped

    if isinstance(error, RecipeError):
        first, *more = error.problems
        said = f"{first.place}: {first.message}" if first.place else first.message
        return said + (f" (and {len(more)} more)" if more else "")
    said = " ".join(str(error).split())
    if isinstance(error, (EnvironmentUnfit, Stopped)):  # true of all ranks
        return said
    if isinstance(error, PluginFailure):
        return f"{_rank()}{error.said()}"
    if isinstance(error, NoAnswer):
        return f"{_rank()}{said}"
    notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
    return f"{_rank()}{type(error).__name__}: {said}{notes}"


def _rank() -> str:
    return f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""


def leave(code: int, message: str) -> NoReturn:
    """End this process at once: collectives that other ranks wait in must not hold it back."""
    if message:
        print(message, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
