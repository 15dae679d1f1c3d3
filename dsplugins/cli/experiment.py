"""`dsplugins experiment NAME`: experiments that leave a record and a picture."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dsplugins.cli.communication import communication
from dsplugins.cli.experiment_runs import folder, needs_matplotlib, train_all
from dsplugins.cli.fp8 import fp8
from dsplugins.cli.gpu import gpu
from dsplugins.cli.memory import memory

if TYPE_CHECKING:
    from dsplugins.experiments.balance import Measured


@click.group("experiment")
def command() -> None:
    """Run an experiment: several training runs, a record of the numbers, a picture, a verdict."""


command.add_command(communication)
command.add_command(fp8)
command.add_command(gpu)
command.add_command(memory)


@command.command("balance")
@click.argument("overrides", nargs=-1)
@click.option(
    "--steps", default=300, show_default=True, type=click.IntRange(min=3), help="Steps of each run."
)
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(min=1), help="Runs of each way.")
@click.option("--jobs", default=1, show_default=True, type=click.IntRange(min=1), help="Runs side by side.")
@click.option(
    "--out",
    default="docs/records",
    show_default=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for balance.json and balance.png.",
)
@click.option(
    "--runs",
    "kept",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the run directories, which are then kept: called again, complete runs are not repeated.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the record instead of a table.")
def balance(
    overrides: tuple[str, ...],
    steps: int,
    seeds: int,
    jobs: int,
    out: Path,
    kept: Path | None,
    as_json: bool,
) -> None:
    """Compare expert balance by V3's bias, by an auxiliary loss, and without either.

    Trains experiments/balance.yaml three ways with the same seeds and data; OVERRIDES are dot keys for all
    of them. MaxVio with the bias is to be at most 0.5 times that of the auxiliary loss at 1e-3, and that at
    most 0.8 times that without balancing, on each seed and on the mean. Exit code 1 where it is not.
    """
    from dsplugins import records
    from dsplugins.experiments import balance as experiment
    from dsplugins.experiments.balance_plot import draw

    needs_matplotlib()
    with folder(kept, "balance") as where:
        measured = _measured(steps, seeds, jobs, overrides, where)
    found = experiment.results(measured, steps, overrides)
    line = ["dsplugins", "experiment", "balance", "--steps", str(steps), "--seeds", str(seeds)]
    path = records.write(out, "balance", [*line, *map(shlex.quote, overrides)], found)
    draw(measured, out / "balance.png")
    click.echo(path.read_text() if as_json else _page(found, path), nl=not as_json)
    raise SystemExit(0 if found["holds"] else 1)


def _measured(steps: int, seeds: int, jobs: int, overrides: Sequence[str], where: Path) -> list[Measured]:
    """Train all runs and look at each."""
    from dsplugins.experiments import balance as experiment

    planned = list(experiment.runs(steps, seeds, overrides))
    train_all([run for _, _, run in planned], where, jobs)
    return [experiment.measure(way, seed, where / run.name) for way, seed, run in planned]


def _page(found: dict[str, Any], path: Path) -> str:
    """Runs, means and verdicts, for people."""
    from dsplugins.cli.columns import columns

    first, last = found["measured_steps"]
    rows = [["WAY", "SEED", "MAXVIO GLOBAL", "MAXVIO BATCH", "VALIDATION LOSS"]]
    rows += [
        _row(run["way"], str(run["seed"]), {**run["max_vio"], "validation_loss": run["validation_loss"]})
        for run in found["runs"]
    ]
    rows += [_row(way, "mean", means) for way, means in found["means"].items()]
    lines = [f"steps {first} to {last} of each run:", columns(rows), ""]
    lines += [f"{name}: {meaning}" for name, meaning in found["measures"].items()]
    lines += ["", columns([_verdict(verdict) for verdict in found["verdicts"]])]
    lines += [
        "",
        f"the claim {'holds' if found['holds'] else 'DOES NOT HOLD'}; {path} and balance.png beside it",
    ]
    return "\n".join(lines)


def _row(way: str, seed: str, numbers: dict[str, float]) -> list[str]:
    return [way, seed, *(f"{numbers[key]:.3f}" for key in ("global", "batch", "validation_loss"))]


def _verdict(verdict: dict[str, Any]) -> list[str]:
    seed = verdict["seed"] if verdict["seed"] == "mean" else f"seed {verdict['seed']}"
    ratio = "no ratio" if verdict["ratio"] is None else f"{verdict['ratio']:.3f}"
    relation = f"{verdict['less']} / {verdict['more']} = {ratio}"
    limit = f"at most {verdict['limit']}"
    return [verdict["measure"], seed, relation, limit, "holds" if verdict["holds"] else "DOES NOT HOLD"]
