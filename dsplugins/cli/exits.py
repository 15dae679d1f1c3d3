"""Exit codes, and how an error becomes one."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsplugins.contracts import RecipeError

CODES = {
    0: "done",
    1: "crashed",
    2: "usage",
    3: "recipe invalid",
    4: "environment not fit",
    75: "stopped early with a checkpoint: run the same command again",
}
DEBUG = "DSPLUGINS_DEBUG"
"""Environment variable behind `--debug`: the ranks that a run starts inherit it."""


def debug() -> None:
    """From now on, in this process and those it starts, plugin failures come with their traceback."""
    os.environ[DEBUG] = "1"


def guarded(call: Callable[[], Any]) -> None:
    """Run `call`; what goes wrong becomes a message on stderr and its exit code.

    A fault of the recipe or the machine is the same on every rank: rank 0 tells it. A crash is told
    by the rank that it happened on.
    """
    from dsplugins.contracts import EnvironmentUnfit, RecipeError

    speaks = os.environ.get("RANK", "0") == "0"
    try:
        call()
    except RecipeError as error:
        _leave(_recipe_code(error), _recipe_message(error) if speaks else "")
    except EnvironmentUnfit as error:
        _leave(4, f"this machine can't run it: {error}" if speaks else "")
    except Exception as error:
        _leave(1, _crash_message(error))


def _recipe_code(error: RecipeError) -> int:
    return 4 if all(problem.kind == "environment" for problem in error.problems) else 3


def _recipe_message(error: RecipeError) -> str:
    from dsplugins.recipe import render

    return render(error.problems)


def _crash_message(error: Exception) -> str:
    """One line for a plugin's failure, unless `--debug`; the whole story for a crash of our own."""
    from dsplugins.manager import HookFailure

    rank = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
    if isinstance(error, HookFailure) and DEBUG not in os.environ:
        said = " ".join(str(error).split())
        return f"{rank}{said}{_place(error.__cause__)} (dsplugins --debug shows the calls)"
    return f"{''.join(traceback.format_exception(error))}{rank}{error}"


def _place(cause: BaseException | None) -> str:
    """` at FILE:LINE`: the last line that ran in the plugin's own folder."""
    # The first frame is the host's, which called the hook.
    frames = traceback.extract_tb(cause.__traceback__)[1:] if cause else []
    if not frames:
        return ""
    folder = os.path.dirname(frames[0].filename)
    own = [frame for frame in frames if os.path.dirname(frame.filename) == folder]
    return f" at {own[-1].filename}:{own[-1].lineno}"


def _leave(code: int, message: str) -> None:
    """End this process at once: collectives that other ranks wait in must not hold it back."""
    if message:
        print(message, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
