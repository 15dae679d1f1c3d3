"""`dsplugins evaluate RUN [KEY=VALUE ...]`: what the weights of a run are worth."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from dsplugins.recipe import Recipe


@click.command("evaluate")
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1)
@click.option("--step", type=int, help="The checkpoint of this step instead of the newest good one.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def command(run: Path, overrides: tuple[str, ...], step: int | None, as_json: bool) -> None:
    """Evaluate the newest checkpoint of a run directory on its validation split.

    Writes nothing, but that `indexed` keeps the indexes of other samples beside the run's, in RUN/data_index.
    Shows validation loss, bits per byte, MTP's acceptance and the load of the experts. Overrides are dot
    keys as for `train`: evaluate.sequences=512 looks at more, run.world_size=1 parallel.expert=1 loads the
    same weights into one process.

    Like `train`, it starts `run.world_size` processes here, or is one rank inside torchrun.
    """
    from dsplugins import rank
    from dsplugins.recipe import Recipe

    rank.adopt_srun()
    rank.end_with_launcher()
    rank.leave_interrupts_to_launcher()
    resolved = run / "recipe.resolved.yaml"
    if not resolved.exists():
        raise click.UsageError(f"{run} holds no run: {resolved} is missing")
    recipe = Recipe.load(resolved, [*overrides, f"run.directory={json.dumps(str(run))}"])
    if rank.inside_torchrun():
        _one_rank(recipe, run, step, as_json)
    else:
        _refuse_absent(run, step)
        options = (["--step", str(step)] if step is not None else []) + (["--json"] if as_json else [])
        _all_ranks(recipe, ["evaluate", *options, str(run), *overrides])


def _refuse_absent(run: Path, step: int | None) -> None:
    """Raise UsageError where there is no checkpoint, or not the one of `step`; no process is started for it.

    Looks at names alone: torch must not be imported before the environment is what plugins need.
    """
    names = (path.name.removeprefix("step-") for path in run.glob("checkpoints/step-*"))
    steps = sorted(int(name) for name in names if name.isdecimal())
    if not steps:
        raise click.UsageError(f"{run} holds no checkpoint to evaluate")
    if step is not None and step not in steps:
        there = ", ".join(map(str, steps))
        raise click.UsageError(f"{run} holds no checkpoint of step {step}: there are those of {there}")


def _all_ranks(recipe: Recipe, arguments: list[str]) -> None:
    """Start the ranks on this machine; their code is this process's."""
    from dsplugins.cli import exits, start
    from dsplugins.contracts import Problem, RecipeError
    from dsplugins.plan import prepare

    plugins, plan = prepare(recipe)
    if not plan.evaluate.sequences:
        said = "evaluate.sequences=0: nothing to look at"
        problem = Problem(said, "evaluate.sequences", "give evaluate.sequences=64 on the command line")
        raise RecipeError(recipe.located([problem]))
    start.ready(recipe, plan, plugins)
    outcome = start.started(plan, arguments)
    exits.leave(outcome.code, f"dsplugins evaluate: {outcome.reason}" if outcome.code else "")


def _one_rank(recipe: Recipe, run: Path, step: int | None, as_json: bool) -> None:
    from dsplugins import rank
    from dsplugins.examine import examine

    found = examine(recipe, run, step)
    if not rank.number():
        click.echo(json.dumps(found, indent=1) if as_json else "\n".join(_lines(found)))


def _lines(found: dict[str, Any]) -> Iterator[str]:
    from dsplugins.show import sequences

    yield from (f"passed over: {fault}" for fault in found["damaged"])
    yield f"checkpoint: {found['checkpoint']}"
    yield from (f"other than in the run: {difference}" for difference in found["differences"])
    looked_at = sequences(found["sequences"], found["sequences_asked"])
    yield f"validation loss: {found['loss']:.5f} nats a token ({looked_at})"
    if found["bits_per_byte"] is not None:
        yield f"bits per byte: {found['bits_per_byte']:.5f}"
    for name, value in found["baselines"].items():
        verdict = "beaten" if found["loss"] < value else "NOT beaten"
        yield f"  entropy of a {name} model on the same text: {value:.5f} ({verdict})"
    if found["mtp_loss"] is not None:
        yield f"MTP: loss {found['mtp_loss']:.5f}, second-token acceptance {found['mtp_acceptance']:.1%}"
    if found["expert_load"]:
        yield f"MaxVio: {found['max_vio']:.3f}; load of each layer's experts, least to most, over their mean:"
        yield from (_load(layer, counts) for layer, counts in found["expert_load"].items())


def _load(layer: str, counts: tuple[int, ...]) -> str:
    """`decoder.3  0.71 0.85 ... 1.31   dead 0`: quantiles where there are many experts."""
    mean = sum(counts) / len(counts) or 1.0
    ordered = sorted(count / mean for count in counts)
    shown = ordered if len(ordered) <= 8 else [ordered[round(i * (len(ordered) - 1) / 7)] for i in range(8)]
    dead = sum(count == 0 for count in counts)
    return f"  {layer:<12}{' '.join(f'{value:.2f}' for value in shown)}  dead {dead}"
