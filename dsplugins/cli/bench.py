"""`dsplugins bench loop | huggingface`: a step's speed beside another one's, measured in turn."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from dsplugins.bench.turns import Timed

SIZES = {"small": ("bench/small.yaml", 1), "large": ("bench/large.yaml", 2)}
"""Size -> recipe and threads."""
OUT = click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for a record: docs/records.",
)


@click.group("bench")
def command() -> None:
    """Time steps beside something else, in turn; quote the ratio, not the seconds."""


@command.command("loop")
@click.argument("recipe")
@click.argument("overrides", nargs=-1)
@click.option(
    "--rounds", default=30, show_default=True, type=click.IntRange(min=1), help="Steps of each kind."
)
@OUT
def loop(recipe: str, overrides: tuple[str, ...], rounds: int, out: Path | None) -> None:
    """Compare with a hand-written megatron-core loop over the same modules, on the recipe's own ranks."""
    from dsplugins import rank

    if not rank.inside_torchrun():
        from dsplugins.cli import start
        from dsplugins.plan import prepare
        from dsplugins.recipe import Recipe

        loaded = Recipe.load(recipe, overrides)
        plugins, plan = prepare(loaded)
        start.ready(loaded, plan, plugins)
        more = ["--out", str(out)] if out else []
        line = ["bench", "loop", recipe, *overrides, "--rounds", str(rounds), *more]
        raise SystemExit(start.started(plan, line).code)
    rank.end_with_launcher()
    rank.leave_interrupts_to_launcher()
    timed = _loop(recipe, overrides, rounds)
    if rank.number() == 0:
        _tell("bench_loop", ("dsplugins", "hand_written"), timed, out)


def _loop(recipe: str, overrides: tuple[str, ...], rounds: int) -> Timed:
    from dsplugins import blame, process_group
    from dsplugins.plan import prepare
    from dsplugins.quiet import quiet
    from dsplugins.recipe import Recipe

    quiet()
    loaded = Recipe.load(recipe, overrides)
    plugins, plan = prepare(loaded)
    platform, device = process_group.stand(plan, plugins)
    from dsplugins.assemble import assemble
    from dsplugins.bench.loop import measure

    with blame.named(plugins):
        return measure(assemble(loaded, plan, plugins, platform, device), rounds)


@command.command("huggingface")
@click.option("--size", type=click.Choice(list(SIZES)), default="small", show_default=True)
@click.option("--rounds", default=10, show_default=True, type=click.IntRange(min=1), help="Turns of each.")
@click.option("--steps", default=2, show_default=True, type=click.IntRange(min=1), help="Steps in a turn.")
@OUT
def huggingface(size: str, rounds: int, steps: int, out: Path | None) -> None:
    """Compare with transformers' DeepseekV3ForCausalLM: same shapes, tokens and threads, bf16, AdamW, no MTP.

    dsplugins keeps FP32 master weights and gradients; the other side trains bf16 weights as they are.
    """
    from dsplugins.bench.huggingface import measure
    from dsplugins.contracts import EnvironmentUnfit
    from dsplugins.recipe import recipe_folder

    if importlib.util.find_spec("transformers") is None:
        raise EnvironmentUnfit("bench huggingface needs transformers: pip install 'dsplugins[hf]'")
    recipe, threads = SIZES[size]
    timed = measure(str(recipe_folder() / recipe), threads, rounds, steps)
    _tell(f"bench_huggingface_{size}", ("dsplugins", "huggingface"), timed, out)


def _tell(name: str, names: tuple[str, str], timed: Timed, out: Path | None) -> None:
    from dsplugins import records

    results = timed.results(names)
    for who in names:
        click.echo(f"{who:14}{results[f'{who}_seconds_median']:.4f} s a step (median of {len(timed.first)})")
    click.echo(f"ratio of medians: {timed.ratio:.3f}")
    if out:
        words = ["dsplugins", *sys.argv[1:]]
        click.echo(f"record: {records.write(out, name, words, results)}")
