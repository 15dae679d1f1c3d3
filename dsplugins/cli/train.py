"""`dsplugins train RECIPE [KEY=VALUE ...]`."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

if TYPE_CHECKING:
    from dsplugins.contracts import Plan
    from dsplugins.launcher import Outcome
    from dsplugins.manager import Plugins
    from dsplugins.recipe import Recipe
    from dsplugins.rundir import RunDirectory


@click.command("train")
@click.argument("recipe")
@click.argument("overrides", nargs=-1)
@click.option("--fresh", is_flag=True, help="Start over in the recipe's run directory.")
@click.option("--accept-changes", is_flag=True, help="Go on although recipe, plugins or data have changed.")
def command(recipe: str, overrides: tuple[str, ...], fresh: bool, accept_changes: bool) -> None:
    """Train RECIPE; overrides are dot keys, such as train.steps=10.

    An unfinished run goes on from its newest good checkpoint: give the same command again.

    Outside torchrun, starts `run.world_size` processes on this machine. Inside (`torchrun ... -m
    dsplugins train RECIPE`), and as one of several tasks of srun, each process is one rank.
    """
    from dsplugins import rank
    from dsplugins.recipe import Recipe

    rank.adopt_srun()
    rank.end_with_launcher()
    rank.leave_interrupts_to_launcher()
    loaded = Recipe.load(recipe, overrides)
    if rank.inside_torchrun():
        _one_rank(loaded, fresh, accept_changes)
    else:
        again = ["--fresh"] * fresh + ["--accept-changes"] * accept_changes
        _all_ranks(loaded, ["train", *again, recipe, *overrides], fresh, accept_changes)


def _one_rank(recipe: Recipe, fresh: bool, accept: bool) -> None:
    """This rank's part. However it fails, `status.json` tells, in every run whose directory is known."""
    from dsplugins import rank
    from dsplugins.plan import prepare, run_directory
    from dsplugins.rundir import RunDirectory

    path = run_directory(recipe)
    run = RunDirectory(path) if path else None
    try:
        if run and not rank.has_launcher() and _complete(run, recipe, prepare(recipe)[0], fresh, accept):
            return
        from dsplugins.train import train

        train(recipe, fresh, accept)
    except Exception as error:
        if run is None:
            raise
        _fail(run, recipe, error)


def _fail(run: RunDirectory, recipe: Recipe, error: Exception) -> NoReturn:
    """Leave with what went wrong: in full, unless another rank has told the same or was the cause of it."""
    from dsplugins import rank
    from dsplugins.cli import exits
    from dsplugins.contracts import RecipeError
    from dsplugins.failures import HookFailure
    from dsplugins.rundir import STOPPED, Occupied

    if isinstance(error, Occupied):
        exits.leave(exits.code_of(error), "" if rank.number() else exits.message_of(error))
    if isinstance(error, RecipeError):
        error = RecipeError(recipe.located(error.problems))
    code, reason = exits.code_of(error), exits.reason_of(error)
    stands = run.end(code, reason)
    calls = run.keep_calls(exits.calls_of(error)) if code == 1 else None
    if code == STOPPED:
        exits.leave(code, exits.message_of(error) if not rank.number() else "")
    if stands["rank"] == rank.number() or isinstance(error, HookFailure):
        exits.leave(code, exits.message_of(error, calls))
    if code in (3, 4):
        exits.leave(code, "" if stands["reason"] == reason else exits.message_of(error))
    exits.leave(code, f"{reason} (rank {stands['rank']} had failed before)")


def _all_ranks(recipe: Recipe, arguments: list[str], fresh: bool, accept: bool) -> None:
    """Start the ranks on this machine and wait for them; their code is this process's."""
    from dsplugins.cli import start
    from dsplugins.rundir import RunDirectory
    from dsplugins.wishes import Interrupted, interrupted

    plugins, plan = prepared(recipe)
    run = RunDirectory(Path(plan.run.directory))
    if _complete(run, recipe, plugins, fresh, accept):
        return
    start.ready(recipe, plan, plugins)
    with run.held():
        run.announce()
        began = time.time()
        try:
            with interrupted():  # until the launcher listens, and again when it has ended
                outcome = start.started(plan, arguments)
        except Interrupted as stop:
            status = _asked(run, f"stopped by {stop.name}", began)
        else:
            status = _outcome(run, outcome, began)
    told = status["code"] in (3, 4) and status.get("rank") is not None  # by the first rank, in full
    if status["code"] and not told:
        line = shlex.join(["dsplugins", *arguments])
        click.echo(f"{line}: exit code {status['code']}: {status['reason']}", err=True)
    raise SystemExit(status["code"])


def _outcome(run: RunDirectory, outcome: Outcome, began: float) -> dict[str, Any]:
    """What `status.json` holds at the end, with what the ranks did not say themselves."""
    from dsplugins.cli import exits

    if outcome.asked:
        return _asked(run, outcome.reason, began)
    code = outcome.code if outcome.code in exits.CODES else 1
    if run.lost():
        return {"code": code or 1, "reason": f"{outcome.reason}; {run.path} is another run's by now"}
    status = run.status() or {"code": None}
    if outcome.unsaid or status["code"] != code:  # the ranks did not say so, or not all of it
        reason = outcome.reason if code else "all ranks left before the run was complete"
        status = run.end(code or 1, reason, overrule=True)
    return status


def _asked(run: RunDirectory, reason: str, began: float) -> dict[str, Any]:
    """The same where they were asked to end, and ended otherwise than by themselves.

    Before a step nothing is lost, and whoever starts a run again after a 75 is to do so.
    """
    from dsplugins.rundir import STOPPED

    status = run.verdict() or {"code": None}
    if status["code"] in (0, STOPPED):  # they had said all, and were asked once more
        return status
    if status["code"] is None and not run.stepped_since(began):
        return run.end(STOPPED, f"{reason} before it took a step: give the same command again", overrule=True)
    return run.end(1, reason, overrule=True)


def prepared(recipe: Recipe) -> tuple[Plugins, Plan]:
    """Every problem that can be found without importing torch is found before a process is started."""
    from dsplugins.contracts import RecipeError
    from dsplugins.plan import survey
    from dsplugins.settings import ledger

    plugins, plan, problems = survey(recipe)
    if plugins and plan and plan.layout.data > 0:  # else plugins would be asked about a layout that can't be
        problems += ledger(plan, plugins, recipe).problems
    if problems or plugins is None or plan is None:
        raise RecipeError(recipe.located(problems))
    return plugins, plan


def _complete(run: RunDirectory, recipe: Recipe, plugins: Plugins, fresh: bool, accept: bool) -> bool:
    """Whether there is nothing left to do.

    Raises RecipeError with every difference where the run was made from another recipe or other plugins,
    unless `accept`; the loop records those.
    """
    from dsplugins import changes, rank
    from dsplugins.contracts import RecipeError

    if fresh or not run.begun():
        return False
    differences = changes.since(run.path, recipe, plugins)
    if differences and not accept:
        raise RecipeError(recipe.located(changes.problems(run.path, differences)))
    if differences or not run.complete():
        return False
    if not rank.number():
        run.end(0, "complete", steps=run.steps())
        click.echo(f"{run.path}: this run is complete ({run.steps()} steps); --fresh starts it over")
    return True
