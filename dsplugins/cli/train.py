"""`dsplugins train RECIPE [KEY=VALUE ...]`."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import click


@click.command("train")
@click.argument("recipe")
@click.argument("overrides", nargs=-1)
@click.option("--fresh", is_flag=True, help="Start over in the recipe's run directory.")
def command(recipe: str, overrides: tuple[str, ...], fresh: bool) -> None:
    """Train RECIPE; overrides are dot keys, such as train.steps=10.

    Outside torchrun, starts `run.world_size` processes on this machine. Inside (`torchrun ... -m
    dsplugins train RECIPE`), each process is one rank.
    """
    from dsplugins.cli import exits
    from dsplugins.launcher import inside_torchrun, run_local
    from dsplugins.recipe import Recipe

    loaded = Recipe.load(recipe, overrides)
    if inside_torchrun():
        from dsplugins.train import train

        raise SystemExit(train(loaded))
    world_size, directory = _prepare(loaded)
    if _complete(loaded, directory, fresh):
        return
    arguments = ["train", recipe, *overrides]
    code = run_local(world_size, arguments)
    if code:
        _tell(code, directory, shlex.join(["dsplugins", *arguments]))
    raise SystemExit(code if code in exits.CODES else 1)


def _prepare(recipe: object) -> tuple[int, Path]:
    """Every problem that can be found without importing torch is found before a process is started."""
    from dsplugins.contracts import RecipeError
    from dsplugins.plan import prepare
    from dsplugins.recipe import Recipe
    from dsplugins.settings import ledger

    assert isinstance(recipe, Recipe)
    plugins, plan = prepare(recipe)
    if problems := ledger(plan, plugins, recipe).problems:
        raise RecipeError(recipe.located(problems))
    return plan.run.world_size, Path(plan.run.directory)


def _complete(recipe: object, directory: Path, fresh: bool) -> bool:
    """Whether the run is over already; clears the folder for `--fresh`, refuses to overwrite another run."""
    from dsplugins.contracts import EnvironmentUnfit
    from dsplugins.recipe import Recipe
    from dsplugins.rundir import RunDirectory

    assert isinstance(recipe, Recipe)
    run = RunDirectory(directory)
    if fresh:
        run.clear()
        return False
    status = run.status()
    if status and status["code"] == 0 and run.same_recipe(recipe):
        click.echo(f"{directory}: this run is complete ({status['steps']} steps); --fresh starts it over")
        return True
    if (directory / "metrics.jsonl").exists() and not run.same_recipe(recipe):
        raise EnvironmentUnfit(
            f"{directory} holds a run of another recipe: --fresh starts over, run.directory=... beside"
        )
    if (directory / "metrics.jsonl").exists() and os.path.getsize(directory / "metrics.jsonl"):
        click.echo(f"{directory}: an unfinished run is here; this version can't resume, it starts over")
    run.clear()
    return False


def _tell(code: int, directory: Path, command_line: str) -> None:
    import json

    file = directory / "status.json"
    reason = json.loads(file.read_text())["reason"] if file.exists() else "a rank ended"
    click.echo(f"{command_line}: exit code {code}: {reason}", err=True)
