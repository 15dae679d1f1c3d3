"""The training loop, readable top to bottom.

`train` assembles one rank, takes the steps and finishes the run; hooks are called before the first step
and at most once a step after it.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsplugins import process_group
from dsplugins.contracts import EnvironmentUnfit, Evaluation, RecipeError, RunEnd, Step, Train
from dsplugins.plan import prepare
from dsplugins.rundir import RunDirectory, versions
from dsplugins.show import Display

if TYPE_CHECKING:
    from dsplugins.assemble import Assembly
    from dsplugins.recipe import Recipe


def train(recipe: Recipe) -> int:
    """One rank of a run; returns its exit code. Expects torchrun's environment variables."""
    plugins, plan = prepare(recipe)
    process_group.right_world(plan)
    directory = RunDirectory(Path(plan.run.directory))
    leads = os.environ.get("RANK", "0") == "0"
    display = Display(speaks=leads)
    try:
        platform = plugins.slot("platform", plan=plan)
        device = platform.prepare(int(os.environ.get("LOCAL_RANK", "0")))
        from dsplugins.assemble import assemble  # megatron-core, on a platform that is ready for it

        run = assemble(recipe, plan, plugins, platform, device)
        if leads:
            directory.start(recipe, plugins)
        Loop(run, directory, display).run()
    except BaseException as error:
        display.stop_bar()
        if leads:
            directory.end(_code(error), f"{type(error).__name__}: {error}".splitlines()[0])
        raise
    return 0


def _code(error: BaseException) -> int:
    if isinstance(error, RecipeError):
        return 3
    return 4 if isinstance(error, EnvironmentUnfit) else 1


class Loop:
    """Steps, evaluations and the end of a run over one rank's assembly."""

    def __init__(self, run: Assembly, directory: RunDirectory, display: Display) -> None:
        self.assembly, self.directory, self.display = run, directory, display
        self.plan, self.plugins, self.leads = run.plan, run.plugins, run.rank == 0
        self.baselines = dict(run.data.baselines()) if run.plan.evaluate.sequences else {}
        self.evaluation: Evaluation | None = None

    def run(self) -> None:
        """Train to the end of the recipe, look at the result, and leave the process group."""
        from dsplugins.step import Progress, take_step

        self.display.opening(self.plan, self.plugins, self._facts())
        self.display.bar(self.plan.train.steps or 0)
        progress, over = Progress(), False
        while not over:
            step = take_step(self.assembly, progress)
            progress = progress.after(step.global_batch)
            over = _over(self.plan.train, step)
            self._report(step, over)
            every = self.plan.evaluate.every
            if every and step.step % every == 0 and not over:
                self._evaluate(step.step)
        self.display.stop_bar()
        if self.plan.evaluate.sequences:
            self._evaluate(progress.steps)
        self._finish(progress.steps)

    def _facts(self) -> dict[str, str]:
        """What the opening tells beside the plugins; collective."""
        from dsplugins import counts

        run = self.assembly
        total, activated = counts.parameters(run.settings.model, run.chunks)
        batch = int(self.plan.train.global_batch.at(0, 0))
        return {
            "parameters": f"{total:,} total, {activated:,} activated a token (with MTP, embedding and head)",
            "tokens a step": f"{batch * self.plan.data.seq_length:,} at the start",
            "gradients": str(run.chain),
            "data": ", ".join(f"{k} {v}" for k, v in run.data.facts.items()),
            "run directory": str(self.directory.path),
        }

    def _report(self, step: Step, over: bool) -> None:
        """The step's row in `metrics.jsonl`, with what events add, and its line where one is due."""
        row = as_row(step, self.plan.data.seq_length)
        for _, more in self.plugins.event("ds_step_end", step=step):
            row.update(more or {})
        if self.leads:
            self.directory.log(row)
        logged = step.step == 1 or step.step % self.plan.train.log_every == 0 or over
        self.display.step(step, row, logged)

    def _evaluate(self, done: int) -> None:
        from dsplugins.evaluate import evaluate

        run = self.assembly
        self.evaluation = evaluate(self.plan, run.data, run.chunks, run.forward_backward, done, run.device)
        self.plugins.event("ds_evaluated", evaluation=self.evaluation)
        self.display.evaluation(self.evaluation, self.baselines)

    def _finish(self, done: int) -> None:
        """A completion, the plots, `run.json` and `status.json`; the process group ends."""
        import torch

        completion = self._completion()
        if self.leads:
            path = self.directory.path
            end = RunEnd(self.plan, path, done, self.evaluation, self.baselines, completion)
            for name, shown in self.plugins.event("ds_run_end", end=end):
                for key, value in (shown or {}).items():
                    self.display.say(f"{name}: {key}: {value}")
            (path / "run.json").write_text(json.dumps(self._summary(completion), indent=1) + "\n")
            self.directory.end(0, "complete", steps=done)
            self.display.say(f"done: {done} steps, everything is in {path}")
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()

    def _summary(self, completion: tuple[str, str, str] | None) -> dict[str, Any]:
        return {
            "evaluation": vars(self.evaluation) if self.evaluation else None,
            "baselines": self.baselines,
            "completion": completion,
            "peak_memory": self.assembly.platform.peak_memory(),
            "versions": versions(),
        }

    def _completion(self) -> tuple[str, str, str] | None:
        from dsplugins.evaluate import complete

        run = self.assembly
        prompt = run.data.prompt() if self.plan.evaluate.sequences else None
        if prompt is None:
            return None
        tokens, truth = prompt
        length = min(48, self.plan.data.seq_length // 4)
        written = complete(self.plan, tokens, length, run.chunks, run.forward_backward, run.device)
        texts = (run.data.decode(tokens), run.data.decode(written), truth)
        self.display.completion(*texts)
        return texts


def as_row(step: Step, seq_length: int) -> dict[str, Any]:
    """A step as `metrics.jsonl` holds it; null where the model has no such thing."""
    return {
        "step": step.step,
        "time": time.time(),
        "tokens": step.tokens,
        "loss": step.loss,
        "mtp_loss": step.mtp_loss,
        "aux_loss": step.aux_loss,
        "grad_norm": step.grad_norm,
        "learning_rate": step.learning_rate,
        "bias_update_rate": step.scheduled.get("moe_router_bias_update_rate"),
        "mtp_weight": step.scheduled.get("mtp_loss_scaling_factor"),
        "global_batch": step.global_batch,
        "max_vio": step.max_vio,
        "tokens_per_second": step.global_batch * seq_length / step.seconds,
        "step_seconds": step.seconds,
        "skipped": step.skipped,
    }


def _over(train: Train, step: Step) -> bool:
    if train.steps is not None:
        return step.step >= train.steps
    assert train.tokens is not None, "plan.prepare refuses a run without an end"
    return step.tokens >= train.tokens


__all__ = ["Loop", "as_row", "train"]
