"""The templates in `launch/`, filled with a job: every value quoted for the shell or for YAML."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from dsplugins.launching.job import Job

SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
"""What torchrun hands on to its ranks: its own four, and the other that asks a run to save (`wishes`)."""


def template_folder() -> Path:
    """`launch/` of a checkout, else the folder inside the wheel."""
    package = Path(__file__).resolve().parents[1]
    checkout = package.parent
    in_checkout = (checkout / "pyproject.toml").is_file() and (checkout / "launch").is_dir()
    return checkout / "launch" if in_checkout else package / "_launch"


def fill(template: str, job: Job) -> str:
    """The text of one of the templates for `job`."""
    engine = Environment(
        loader=FileSystemLoader(template_folder()),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    engine.filters |= {"sh": _shell, "yaml": json.dumps, "pod": _pod}
    return engine.get_template(template).render(vars(job), signals=SIGNALS)


def _shell(value: str | int | Iterable[str]) -> str:
    """One word, or several with blanks between them, as a shell reads them."""
    return shlex.quote(str(value)) if isinstance(value, str | int) else shlex.join(value)


def _pod(value: str | Sequence[str]) -> str:
    """Text or a list of it as YAML, where Kubernetes puts variables in: it takes `$$` for a dollar."""
    return json.dumps(value).replace("$", "$$")


__all__ = ["SIGNALS", "fill", "template_folder"]
