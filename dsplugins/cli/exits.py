"""Exit codes, and how an error becomes one."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

CODES = {
    0: "done",
    1: "crashed",
    2: "usage",
    3: "recipe invalid",
    4: "environment not fit",
    75: "stopped early with a checkpoint: run the same command again",
}


def guarded(call: Callable[[], Any]) -> None:
    """Run `call`; known errors become one message on stderr and their exit code, on rank 0 only."""
    from dsplugins.contracts import EnvironmentUnfit, RecipeError

    speaks = os.environ.get("RANK", "0") == "0"
    try:
        call()
    except RecipeError as error:
        from dsplugins.recipe import render

        if speaks:
            print(render(error.problems), file=sys.stderr)
        only_here = all(problem.kind == "environment" for problem in error.problems)
        _leave(4 if only_here else 3)
    except EnvironmentUnfit as error:
        if speaks:
            print(f"this machine can't run it: {error}", file=sys.stderr)
        _leave(4)
    except Exception as error:
        traceback.print_exc()
        print(f"rank {os.environ.get('RANK', '0')}: {error}", file=sys.stderr)
        _leave(1)


def _leave(code: int) -> None:
    """End this process at once: collectives that other ranks wait in must not hold it back."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
