"""`dsplugins report RUN`: one HTML page of a run."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("report")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Where to write it; RUN/report.html by default.")
def command(run: Path, out: Path | None) -> None:
    """Make one HTML page of a run directory, with its pictures inside: a file to send to somebody.

    Works on a run that is under way or has failed, too. Reads the run directory only.
    """
    import importlib.util

    from dsplugins.contracts import EnvironmentUnfit

    if importlib.util.find_spec("matplotlib") is None:
        raise EnvironmentUnfit("report draws with matplotlib: pip install 'dsplugins[plot]'")
    from dsplugins.report.facts import read
    from dsplugins.report.page import page

    try:
        facts = read(run)
    except FileNotFoundError as error:
        raise click.UsageError(f"{run} holds no run: {error.filename} is missing") from error
    target = out or run / "report.html"
    try:
        target.write_text(page(facts), encoding="utf-8")
    except OSError as error:
        raise EnvironmentUnfit(f"{target} can't be written: {error.strerror}; name another --out") from error
    click.echo(f"wrote {target}")
