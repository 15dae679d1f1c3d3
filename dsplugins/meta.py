"""The child process of `dsplugins check`: a recipe's settings and every pipeline stage, built on nothing.

Takes a recipe and overrides as JSON on stdin, leaves its findings as JSON in the file that it is given:
`python -m dsplugins.meta ANSWER < REQUEST`. A process of its own, since it redirects `torch.cuda` to the
meta device, where tensors have shapes and no memory, and pretends to be one rank after the other.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsplugins.contracts import EnvironmentUnfit, Problem, RecipeError
from dsplugins.failures import PluginFailure

if TYPE_CHECKING:
    from dsplugins.contracts import Plan, Settings
    from dsplugins.manager import Plugins
    from dsplugins.recipe import Recipe


def main() -> None:
    """Answer one request."""
    request = json.load(sys.stdin)
    Path(sys.argv[1]).write_text(json.dumps(answer(request["recipe"], request["overrides"])))


def answer(path: str, overrides: list[str]) -> dict[str, Any]:
    """What there is to say: `problems`, of both kinds, and `built` where there is none with the recipe.

    Where a plugin's own code fails, `failed` says which, in one line, and `calls` has the traceback.
    """
    from dsplugins import blame
    from dsplugins.plan import prepare
    from dsplugins.recipe import Recipe

    recipe = Recipe.load(path, overrides)
    problems: list[Problem] = []
    built = None
    try:
        plugins, plan = prepare(recipe)
        with blame.named(plugins):
            built = build(recipe, plan, plugins, problems)
    except PluginFailure as error:
        return {"failed": error.said(), "calls": "".join(traceback.format_exception(error))}
    except RecipeError as error:
        problems += error.problems
    except EnvironmentUnfit as error:
        remedy = "the plugin that says so should name a stand_in, for a build without its library"
        problems.append(Problem(f"can't be built here: {error}", "plugins", remedy, kind="environment"))
    return {"problems": [asdict(problem) for problem in recipe.located(problems)], "built": built}


def build(recipe: Recipe, plan: Plan, plugins: Plugins, problems: list[Problem]) -> dict[str, Any] | None:
    """Settings as in a run, then the stages; None where something forbids it, which is in `problems`."""
    from dsplugins.cuda_redirect import install

    install("meta")
    from dsplugins import audit, settings, stages

    writers, settled = _settled(recipe, plan, plugins, problems)
    problems += settings.objections(plan, plugins, settled)
    stage = stages.Stage(plan, settled, writers, ())
    problems += map(audit.problem, audit.fields.held(stage))
    for key, said in audit.ignored(settled, plan.slots):
        problems.append(Problem(said, key, "leave it out, or change what it names"))
    if any(problem.kind == "recipe" for problem in problems):
        return None
    return _build_stages(recipe, plan, plugins, problems)


def _settled(
    recipe: Recipe, plan: Plan, plugins: Plugins, problems: list[Problem]
) -> tuple[Plugins, Settings]:
    """Settings, and the plugins that they are of: stand-ins where megatron-core misses a library itself."""
    from dsplugins import settings, stand_ins

    try:
        return plugins, settings.construct(plan, plugins, recipe)
    except RecipeError as error:
        if any(problem.kind == "recipe" for problem in error.problems):
            raise
        problems += error.problems
    with_stand_ins, _ = stand_ins.substitute(plugins)
    return with_stand_ins, settings.construct(plan, with_stand_ins, recipe)


def _build_stages(
    recipe: Recipe, plan: Plan, plugins: Plugins, problems: list[Problem]
) -> dict[str, Any] | None:
    """All stages, with stand-ins; None if one can't be built."""
    from dsplugins import counts, settings, stages, stand_ins

    began = time.perf_counter()
    with_stand_ins, substitutes = stand_ins.substitute(plugins)
    settled = settings.construct(plan, with_stand_ins, recipe)
    if unable := stand_ins.objections(with_stand_ins, substitutes, plan, settled):
        problems += unable
        return None
    found = stages.build_all(recipe, plan, with_stand_ins)
    problems += found.problems
    if found.problems:
        return None
    rows = found.counts.rows(counts.share(settled.model))
    weights = rows["activated_head_only"]["trainable"]
    kept, pairs = counts.total(found.kept), counts.total(found.pairs)
    return {
        "stand_ins": dict(substitutes),
        "stages": [asdict(row) for row in found.rows],
        "counts": rows,
        "kv_cache_bytes": None if kept is None else 2 * kept,
        "work": None if pairs is None else {"weights": weights, "pairs": pairs},
        "build_seconds": time.perf_counter() - began,
    }


if __name__ == "__main__":
    main()
