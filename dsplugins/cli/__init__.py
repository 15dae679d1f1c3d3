"""The `dsplugins` command. Subcommands are imported only when they are called."""

from __future__ import annotations

import difflib
import importlib
from typing import Any

import click

COMMANDS = {
    "train": "Train a recipe.",
    "launch": "Start a recipe on many machines: Slurm, Kubernetes, torchrun.",
    "check": "Build a recipe's stages without memory, count parameters, find what is wrong.",
    "explain": "Show every effective value of a recipe with its origin, and who owns each slot.",
    "evaluate": "Evaluate a run's checkpoint: loss, bits per byte, MTP, experts' load.",
    "data": "Make a corpus from text, or look at one.",
    "report": "Make one HTML page of a run, with its pictures.",
    "diff": "Show how two runs were made differently.",
    "plugins": "List installed plugins, or show one.",
    "recipes": "List shipped recipes.",
    "experiment": "Run an experiment that leaves a record.",
    "bench": "Time steps beside a hand-written loop or Hugging Face.",
    "doctor": "Look at this machine: versions, libraries, duplicates.",
}
"""Name -> one line of help; each command is `command` in the module of its name."""


class Lazy(click.Group):
    """A group that knows its commands' names and one line of help without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"dsplugins.cli.{cmd_name}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        if near and name not in COMMANDS and not name.startswith("-"):
            ctx.fail(f"there is no command {name}: did you mean {near[0]}?")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.NoSuchOption as error:
            key = error.option_name.lstrip("-")
            if "." not in key:
                raise
            said = f"{error.message} A recipe's values are given without dashes: {key}=VALUE"
            raise click.NoSuchOption(error.option_name, said, ctx=error.ctx) from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="dsplugins")
@click.option("--debug", is_flag=True, help="Show where in its code a plugin failed, call by call.")
def group(debug: bool) -> None:
    """DeepSeek-V3 training as plugins on unmodified megatron-core."""
    from dsplugins.cli import exits

    if debug:
        exits.debug()


def main() -> None:
    """Entry point: runs a command; what goes wrong becomes one message and an exit code."""
    from dsplugins.cli.exits import guarded

    guarded(group)
