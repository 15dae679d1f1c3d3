"""`dsplugins launch RECIPE [KEY=VALUE ...] --nodes N --on slurm | kubernetes | torchrun`."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path, PurePosixPath
from posixpath import normpath
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from dsplugins.launching.job import Cluster, Job
    from dsplugins.manager import Plugins
    from dsplugins.recipe import Recipe

TEMPLATES = {
    ("slurm", "torchrun"): "slurm_torchrun.sbatch",
    ("slurm", "srun"): "slurm_srun.sbatch",
    ("kubernetes", "trainjob"): "trainjob.yaml",
    ("kubernetes", "jobset"): "jobset.yaml",
    ("torchrun", ""): "torchrun.txt",
}
"""(target, way) -> template; the first way of a target is its default."""
INSTEAD = "--accept-changes goes on with it, run.directory=... begins beside it"
"""What to do where a run would go on as another one."""
SUBMIT = {"slurm": ["sbatch"], "kubernetes": ["kubectl", "apply", "-f"]}


class Word(click.ParamType):
    """Text that means the same in a shell, in YAML and behind #SBATCH."""

    name = "text"

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        """The value, or a usage error if it has blanks, quotes or the like in it."""
        if not re.fullmatch(r"[\w./:,@=+-]*", value):
            self.fail(f"{value!r} has characters other than letters, digits and ./:,@=+-_", param, ctx)
        return str(value)


@click.command("launch")
@click.argument("recipe")
@click.argument("overrides", nargs=-1)
@click.option("--nodes", type=click.IntRange(min=1), required=True, help="Machines.")
@click.option(
    "--on", "target", type=click.Choice(["slurm", "kubernetes", "torchrun"]), required=True, help="Where."
)
@click.option("--processes-per-node", type=click.IntRange(min=1), help="Ranks; default: world_size / nodes.")
@click.option(
    "--by",
    "way",
    type=click.Choice([way for _, way in TEMPLATES if way]),
    help="slurm: torchrun (default) or srun starts the ranks; kubernetes: trainjob (default) or jobset.",
)
@click.option("--grace", type=click.IntRange(min=1), default=300, show_default=True, help="Seconds to save.")
@click.option("--retries", type=click.IntRange(min=0), help="Starts after crashes; default: 3.")
@click.option("--partition", type=Word(), default="", help="Slurm's.")
@click.option("--account", type=Word(), default="", help="Slurm's.")
@click.option("--time", type=Word(), default="", help="Slurm's limit, such as 24:00:00; then it goes on.")
@click.option("--image", type=Word(), default="", help="Container image; under Slurm with pyxis.")
@click.option(
    "--shared", type=Word(), default="", help="Shared folder in the container; CLAIM:FOLDER on Kubernetes."
)
@click.option("--namespace", type=Word(), default="", help="Kubernetes'.")
@click.option("--accept-changes", is_flag=True, help="Go on although recipe, plugins or data have changed.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="File to write.")
@click.option("--dry-run", is_flag=True, help="Print it; write and submit nothing.")
def command(
    recipe: str,
    overrides: tuple[str, ...],
    nodes: int,
    target: str,
    processes_per_node: int | None,
    way: str | None,
    accept_changes: bool,
    out: Path | None,
    dry_run: bool,
    **options: Any,
) -> None:
    """Write what starts RECIPE on many machines, and submit it: sbatch, or kubectl apply.

    On `torchrun` it prints the line for each node; there is nothing to submit. A run that is stopped early
    saves, ends with code 75, and is started again by Slurm or Kubernetes until it is complete; one that
    crashes, up to --retries times.
    """
    from dsplugins.cli import launch_options
    from dsplugins.cli.train import prepared
    from dsplugins.launching.job import job
    from dsplugins.launching.templates import fill
    from dsplugins.recipe import Recipe

    template = _template(target, way)
    launch_options.refuse(target, {**options, "out": out}, dry_run)
    cluster = _cluster(nodes, processes_per_node, options)
    loaded = Recipe.load(recipe, overrides)
    plugins, plan = prepared(loaded)
    work = job(loaded, plugins, plan, cluster, ["--accept-changes"] * accept_changes + [recipe, *overrides])
    if not accept_changes:
        _refuse_changes(loaded, plugins, work)
    text = fill(template, work)
    click.echo(
        f"nodes: {nodes}, ranks on each: {work.processes}; run directory: {work.run_directory}", err=True
    )
    _tell_recipe(recipe, work)
    _tell_data(plugins)
    _tell_environment(plugins)
    if dry_run or target == "torchrun":
        click.echo(text, nl=False)
        return
    file = out or Path(work.name).with_suffix(Path(template).suffix)
    _write(file, text)
    _submit([*SUBMIT[target], str(file)])


def _template(target: str, way: str | None) -> str:
    ways = [each for name, each in TEMPLATES if name == target]
    if way is not None and way not in ways:
        instead = " or ".join(filter(None, ways)) or "leave out --by"
        raise click.UsageError(f"--by {way} is no way to start on {target}: {instead}")
    return TEMPLATES[target, ways[0] if way is None else way]


def _cluster(nodes: int, processes: int | None, options: dict[str, Any]) -> Cluster:
    """What was asked for as a Cluster."""
    from dsplugins.launching.job import Cluster

    claim, _, shared = options.pop("shared").rpartition(":")
    options = {name: value for name, value in options.items() if value is not None}
    return Cluster(nodes=nodes, processes=processes, claim=claim, shared=shared, **options)


def _refuse_changes(recipe: Recipe, plugins: Plugins, work: Job) -> None:
    """Raise RecipeError where the ranks would end with it, if the run's directory can be seen from here."""
    from dsplugins import changes
    from dsplugins.contracts import RecipeError
    from dsplugins.rundir import RunDirectory

    inside = bool(work.cluster.image)
    run = RunDirectory(Path(work.folder if inside else "", work.run_directory))
    if not run.begun():
        return
    differences = changes.since(run.path, recipe, plugins)
    if inside:  # which version of a plugin the image has isn't known here
        differences = [each for each in differences if not each.is_another_version()]
    if differences:
        raise RecipeError(recipe.located(changes.problems(run.path, differences, INSTEAD)))


def _tell_recipe(recipe: str, work: Job) -> None:
    """Where a container looks for a recipe that doesn't come with dsplugins: it may not be there."""
    if work.cluster.image and Path(recipe).is_file():
        inside = normpath(PurePosixPath(work.folder, recipe))
        click.echo(f"recipe: the container has to have {inside}, and what it extends", err=True)


def _tell_data(plugins: Plugins) -> None:
    """What the run learns from, where the plugin has a word about it: a stand-in is not to be paid for."""
    for item in plugins:
        told = getattr(item.plugin, "told", "")
        if item.slot == "data" and told:
            click.echo(f"data: {item.name} ({told})", err=True)


def _tell_environment(plugins: Plugins) -> None:
    from dsplugins.environment import told

    lines = told(plugins) or ["nothing that a plugin asks for"]
    for line in lines:
        click.echo(f"environment: {line}", err=True)


def _write(file: Path, text: str) -> None:
    """Exit code 4 where that can't be done."""
    from dsplugins.contracts import EnvironmentUnfit

    try:
        file.write_text(text)
    except OSError as error:
        raise EnvironmentUnfit(f"{file} can't be written: {error.strerror}; name another --out") from error


def _submit(line: list[str]) -> None:
    """Hand the file over. Exit code 4 if the program for that isn't here or refuses."""
    from dsplugins.contracts import EnvironmentUnfit

    if shutil.which(line[0]) is None:
        raise EnvironmentUnfit(
            f"{line[-1]} is written, but there is no {line[0]} here: submit it where there is"
        )
    done = subprocess.run(line)
    if done.returncode:
        raise EnvironmentUnfit(f"{' '.join(line)} ended with code {done.returncode}")
