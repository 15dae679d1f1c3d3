"""What a run prints: who owns what, one line a logged step, a bar on a terminal, the end."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from dsplugins.contracts import Evaluation, Plan, Step
    from dsplugins.manager import Plugins


def sequences(looked_at: int, asked: int) -> str:
    """`64 sequences`, and how many were asked for where that differs: the split is smaller, or they make no
    whole number of micro-batches of all ranks.
    """
    return f"{looked_at} sequences" + (f" of {asked} asked for" if looked_at != asked else "")


class Display:
    """Rank 0's voice; silent on the others."""

    def __init__(self, speaks: bool) -> None:
        self.speaks = speaks
        self.console = Console(highlight=False, soft_wrap=True, quiet=not speaks)
        self._bar: Progress | None = None
        self._task: Any = None

    def say(self, text: str = "") -> None:
        """One line."""
        self.console.print(text, markup=False)

    def waiting(self, what: str) -> AbstractContextManager[object]:
        """Meanwhile `what` stands on the terminal, if there is one."""
        return self.console.status(what) if self.speaks else nullcontext()

    def opening(self, plan: Plan, plugins: Plugins, facts: Mapping[str, Any]) -> None:
        """Slots and owners, events, layout, and what is known about model and data."""
        table = Table(title=f"dsplugins: {plan.name}", title_justify="left", box=None, pad_edge=False)
        for column in ("slot", "plugin", "from"):
            table.add_column(column)
        for item in plugins:
            told = getattr(item.plugin, "told", "")
            name = f"{item.name} ({told})" if told else item.name
            table.add_row(item.slot, name, f"{item.offer.distribution} {item.offer.version}")
        self.console.print(table)
        sizes = {k: v for k, v in vars(plan.layout).items() if v > 1 and k != "world_size"}
        layout = (
            ", ".join(f"{k} {v}" for k, v in sizes.items()) or "none of tensor, pipeline, expert, context"
        )
        self.say(f"layout: {plan.layout.world_size} processes, data parallel {plan.layout.data}, {layout}")
        for name, value in facts.items():
            self.say(f"{name}: {value}")

    def bar(self, total: int) -> None:
        """A progress bar, on a terminal only; `total` 0 is not known: the run ends by tokens."""
        if self.speaks and self.console.is_terminal:
            columns = (TextColumn("step"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=self.console, transient=True)
            self._bar.start()
            self._task = self._bar.add_task("train", total=total or None)

    def stop_bar(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def step(self, step: Step, row: Mapping[str, Any], logged: bool) -> None:
        """The greppable line of a logged step."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step.step)
        if not logged:
            return
        parts = [f"step {step.step}", f"tokens {step.tokens}", f"loss {step.loss:.5f}"]
        if step.mtp_loss is not None:
            parts.append(f"mtp_loss {step.mtp_loss:.5f}")
        parts += [f"grad_norm {step.grad_norm:.4f}", f"lr {step.learning_rate:.3e}"]
        if step.max_vio is not None:
            parts.append(f"max_vio {step.max_vio:.3f}")
        parts.append(f"tokens/s {row['tokens_per_second']:.0f}")
        self.say("  ".join(parts) + ("  SKIPPED" if step.skipped else ""))

    def evaluation(self, found: Evaluation, baselines: Mapping[str, float], asked: int) -> None:
        """Validation loss beside models that anyone should beat; `asked` for so many sequences."""
        bits = "" if found.bits_per_byte is None else f", {found.bits_per_byte:.4f} bits per byte"
        self.say(
            f"validation at step {found.step}: loss {found.loss:.5f} nats a token{bits} "
            f"({sequences(found.sequences, asked)})"
        )
        for name, value in baselines.items():
            verdict = "beaten" if found.loss < value else "NOT beaten"
            self.say(f"  entropy of a {name} model on the same text: {value:.5f} ({verdict})")
        if found.mtp_loss is not None:
            self.say(f"  MTP: loss {found.mtp_loss:.5f}, second-token acceptance {found.mtp_acceptance:.1%}")

    def completion(self, prompt: str, written: str, truth: str) -> None:
        """A held-out line, completed."""
        self.say(f"held-out prompt:  ...{prompt[-60:]!r}")
        self.say(f"the model writes: {written!r}")
        self.say(f"what stood there: {truth!r}")
