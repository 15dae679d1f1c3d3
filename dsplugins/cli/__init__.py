"""The `dsplugins` command. Subcommands are imported only when they are called."""

from __future__ import annotations

import importlib

import click

COMMANDS = {
    "train": "Train a recipe.",
    "explain": "Show every effective value of a recipe with its origin, and who owns each slot.",
    "plugins": "List installed plugins, or show one.",
    "recipes": "List shipped recipes.",
    "doctor": "Look at this machine: versions, libraries, duplicates.",
}


class Lazy(click.Group):
    """A group that knows its commands' names and one line of help without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"dsplugins.cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="dsplugins")
def group() -> None:
    """DeepSeek-V3 training as plugins on unmodified megatron-core."""


def main() -> None:
    """Entry point: runs a command; what goes wrong becomes one message and an exit code."""
    from dsplugins.cli.exits import guarded

    guarded(group)
