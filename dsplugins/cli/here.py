"""The child process of `dsplugins check --here`: libraries and devices of this machine, for one recipe.

Apart from the one that builds on the meta device, which must see no GPU.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from dsplugins import process_group
from dsplugins.contracts import Problem, RecipeError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dsplugins.contracts import Plan
    from dsplugins.manager import Plugins
    from dsplugins.recipe import Recipe


def main() -> None:
    """Answer one request: `python -m dsplugins.cli.here ANSWER < REQUEST`."""
    from dsplugins.cli.doctor import everything
    from dsplugins.plan import prepare
    from dsplugins.recipe import Recipe

    request = json.load(sys.stdin)
    recipe = Recipe.load(request["recipe"], request["overrides"])
    plugins, plan = prepare(recipe)
    rows = everything()
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", plan.run.world_size))
    problems = [*_libraries(rows), *_devices(plan, plugins, processes), *_parts(recipe, plan, plugins)]
    answer = {
        "problems": [asdict(problem) for problem in recipe.located(problems)],
        "machine": {"processes": processes, "found": rows},
    }
    Path(sys.argv[1]).write_text(json.dumps(answer))


def _libraries(rows: list[dict[str, str]]) -> Iterator[Problem]:
    """What `dsplugins doctor` finds wrong, whatever the recipe."""
    for row in rows:
        if row["state"] == "WRONG":
            said = f"{row['what']}: {row['found']}"
            yield Problem(said, remedy=row["remedy"], place="this machine", kind="environment")


def _devices(plan: Plan, plugins: Plugins, processes: int) -> Iterator[Problem]:
    """What is lacking here for so many processes, and a number that can't be."""
    yield from process_group.lacking(plan, plugins, processes)
    if processes < plan.run.world_size and plan.run.world_size % processes:
        said = f"LOCAL_WORLD_SIZE={processes} does not divide run.world_size={plan.run.world_size}"
        yield Problem(said, "run.world_size", "start as many on each machine", kind="environment")


def _parts(recipe: Recipe, plan: Plan, plugins: Plugins) -> Iterator[Problem]:
    """What plugins find wrong with a GPU that they can see: the process that builds the stages sees none."""
    import torch

    if not torch.cuda.is_available():
        return
    from dsplugins import settings

    try:
        settled = settings.construct(plan, plugins, recipe)
    except RecipeError:
        return  # the other process says so
    for _, found in plugins.event("ds_check", plan=plan, settings=settled):
        yield from (problem for problem in found or () if problem.kind == "environment")


if __name__ == "__main__":
    main()
