"""Two plugins in a package of their own: a router that cools down, and an event that keeps a book."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

from dsplugins.contracts import Range
from dsplugins.hookspecs import hookimpl


@dataclass(frozen=True)
class FirstComeOptions:
    """Options of first_come."""

    temperature: Annotated[float, Range(0.01, 100.0)] = 1.0
    """Divides the logits before the softmax."""


class FirstCome:
    """Each token takes the K experts of its tempered softmax; no balance whatever."""

    Options = FirstComeOptions
    contract = ">=1.0,<2"

    def __init__(self, options):
        self.options = options

    @hookimpl
    def ds_router(self, config):
        """The module, the same for decoder and MTP."""
        from first_come.router import FirstComeRouter

        return partial(FirstComeRouter, temperature=self.options.temperature)


@dataclass(frozen=True)
class StepBookOptions:
    """Options of step_book."""

    file: str = "book.json"
    """Name in the run directory."""


class StepBook:
    """Adds `expert_tokens` to the metrics; writes a book of all steps at the end, those before a stop too."""

    Options = StepBookOptions
    contract = ">=1.1,<2"
    version = 1

    def __init__(self, options):
        self.options, self.pages = options, []

    @hookimpl
    def ds_state(self):
        """This object keeps the pages in the run's checkpoints."""
        return self

    def save(self):
        """All pages so far."""
        return {"pages": self.pages}

    def load(self, saved):
        """The pages of the processes before this one."""
        self.pages = list(saved["pages"])

    @hookimpl
    def ds_step_end(self, step):
        """One page a step."""
        tokens = int(step.expert_counts.sum())
        self.pages.append({"step": step.step, "expert_tokens": tokens})
        return {"expert_tokens": tokens}

    @hookimpl
    def ds_run_end(self, end):
        """The book."""
        path = Path(end.directory) / self.options.file
        path.write_text(json.dumps(self.pages))
        return {"book": str(path)}
