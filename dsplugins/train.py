"""The training loop, readable top to bottom.

`train` assembles one rank, takes the steps and finishes the run; hooks are called before the first step
and at most once a step after it.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsplugins import blame, changes, environment, process_group, rank, unanswered
from dsplugins.contracts import EnvironmentUnfit, Evaluation, RunEnd, Step
from dsplugins.failures import HookFailure
from dsplugins.plan import prepare
from dsplugins.quiet import quiet
from dsplugins.rundir import RunDirectory, versions
from dsplugins.show import Display
from dsplugins.wishes import Stopped, Wishes

if TYPE_CHECKING:
    from dsplugins.assemble import Assembly
    from dsplugins.footprint import Footprint
    from dsplugins.recipe import Recipe
    from dsplugins.step import Progress


def train(recipe: Recipe, fresh: bool = False, accept: bool = False) -> None:
    """One rank of a run, from where its directory stands, or from the start if `fresh`; on data that isn't
    that of its checkpoint if `accept`.

    Expects torchrun's environment variables. Raises Stopped when a signal ended the run early.
    """
    quiet()
    plugins, plan = prepare(recipe)
    process_group.right_world(plan)
    display = Display(speaks=os.environ.get("RANK", "0") == "0")
    try:
        platform, device = process_group.stand(plan, plugins)
        process_group.start(platform, plan)
        process_group.nodes_fit(Path(plan.run.directory))
        from dsplugins.assemble import assemble  # megatron-core, on a platform that is ready for it

        directory = RunDirectory(Path(plan.run.directory))
        patience = unanswered.told(plan.run.timeout_minutes)
        with _alone(directory), Wishes().heard() as wishes, patience, blame.named(plugins):
            run = assemble(recipe, plan, plugins, platform, device)
            Loop(run, directory, display, wishes).run(recipe, fresh, accept)
    finally:
        display.stop_bar()


@contextmanager
def _alone(directory: RunDirectory) -> Iterator[None]:
    """Rank 0 holds the run directory meanwhile, unless our launcher does. Collective.

    Raises Occupied on all ranks while another run is under way there.
    """
    import torch

    if rank.has_launcher():
        yield
        return
    with ExitStack() as stack:
        refused: list[EnvironmentUnfit | None] = [None]
        if not rank.number():
            try:
                stack.enter_context(directory.held())
            except EnvironmentUnfit as error:
                refused = [error]
        torch.distributed.broadcast_object_list(refused)
        if refused[0] is not None:
            raise refused[0]
        yield


class Loop:
    """Steps, evaluations and the end of a run over one rank's assembly."""

    def __init__(self, run: Assembly, directory: RunDirectory, display: Display, wishes: Wishes) -> None:
        from dsplugins.saver import Saver

        self.saver = Saver(run, directory.path / "checkpoints")
        self.assembly, self.directory, self.display, self.wishes = run, directory, display, wishes
        self.plan, self.plugins, self.leads = run.plan, run.plugins, run.rank == 0
        self.baselines = dict(run.data.baselines()) if run.plan.evaluate.sequences else {}
        self.evaluation: Evaluation | None = None

    def run(self, recipe: Recipe, fresh: bool = False, accept: bool = False) -> None:
        """Train to the end of the recipe, look at the result, and leave the process group.

        Goes on from the newest good checkpoint. Raises Stopped when a signal asked for it: the step is
        finished then and a checkpoint written.
        """
        progress = self._begin(recipe, fresh, accept)
        self.display.bar(self.plan.train.steps or 0)
        progress = self._steps(progress)
        self.display.stop_bar()
        if self.plan.evaluate.sequences:
            with self.display.waiting("evaluating"):
                self._evaluate(progress.steps)
        self.saver.close()
        self._finish(progress.steps)

    def _steps(self, progress: Progress) -> Progress:
        """Every step that is left. A wish to stop, since when the model was built, is met after the next one,
        and not after the last: what is left then is to finish.
        """
        from dsplugins.step import take_step

        over = self.plan.train.over(progress.steps, progress.tokens)
        if self._owed(progress.steps, over):
            self._evaluate(progress.steps)
        while not over:
            step = take_step(self.assembly, progress)
            progress = progress.after(step)
            over = self.plan.train.over(step.step, step.tokens)
            self._report(step, over)
            self._meet_not_finite(step, progress)
            self._save(progress, self.wishes.stop, over)
            if self._due(step.step, over):
                self._evaluate(step.step)
                self._save(progress, self.wishes.stop, over)  # what was asked for meanwhile
        return progress

    def _due(self, step: int, over: bool) -> bool:
        """Whether to look at the validation split after `step`; after the last one it is looked at anyway."""
        every = self.plan.evaluate.every
        return bool(every) and step > 0 and step % every == 0 and not over

    def _owed(self, step: int, over: bool) -> bool:
        """Whether the run stopped between a step and its evaluation; collective where one was due."""
        import torch

        if not self._due(step, over):
            return False
        missing = self.leads and step not in self.directory.evaluated()
        flag = torch.tensor(int(missing), dtype=torch.int32, device=self.assembly.device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return bool(flag)

    def _begin(self, recipe: Recipe, fresh: bool, accept: bool) -> Progress:
        """Where the run stands, with the state that belongs to it; what is to be seen first is shown."""
        from dsplugins.audit import audit, describe_run

        progress, told = self.saver.resume(fresh, accept)
        if progress.steps:
            audit(self.assembly)  # once more: what was loaded has kept its number formats
        if self.leads and progress.steps:
            changed = [str(change) for change in changes.since(self.directory.path, recipe, self.plugins)]
            told += self.directory.go_on(recipe, self.plugins, progress.steps, changed)
            told += (f"accepted: {change}" for change in changed)
        elif self.leads:
            told += self._lost(fresh)
            self.directory.start(recipe, self.plugins, fresh)
        facts = self._facts()
        built = [vars(kind) for kind in describe_run(self.assembly.settings.model, self.assembly.chunks)]
        if self.leads:
            self.directory.note("built.json", {**facts, "layers": built})
        self.display.opening(self.plan, self.plugins, facts)
        for line in told:
            self.display.say(line)
        return progress

    def _lost(self, fresh: bool) -> list[str]:
        """What is told of steps that were taken here and left no checkpoint.

        Raises EnvironmentUnfit where one was finished and is gone: starting over would clear the rest.
        """
        if fresh:
            return []
        taken, saved = self.directory.steps(), self.directory.saved()
        if saved is not None:
            path, folder = self.directory.path, self.directory.path / "checkpoints"
            said = f"{taken} steps were taken in {path} and step {saved} was saved, but {folder} holds no"
            raise EnvironmentUnfit(f"{said} checkpoint: bring it back, or start over with --fresh")
        if not taken:
            return []
        return [f"{taken} steps were taken here before and no checkpoint was finished: starting over"]

    def _meet_not_finite(self, step: Step, progress: Progress) -> None:
        """Raise NotFinite, with a dump of every rank; where such steps are skipped, only dump a few."""
        from dsplugins import not_finite

        if not_finite.is_finite(step):
            return
        folder = self.directory.path / "not_finite" / f"step-{step.step:08d}"
        goes_on = self.plan.train.not_finite == "skip"
        if goes_on and not_finite.enough(folder):
            return
        where = not_finite.dump(self.assembly, step, progress.sequences, folder)
        said = f"step {step.step}: loss {step.loss}, gradient norm {step.grad_norm}; {where}"
        if goes_on:
            self.display.say(f"{said}; train.not_finite=skip goes on")
            return
        failure = self._closed()
        raise not_finite.NotFinite(f"{said}; last good checkpoint: {self.saver.newest() or 'none'}{failure}")

    def _closed(self) -> str:
        """Finish what is being saved before something worse is told; what went wrong, to be added."""
        try:
            self.saver.close()
        except Exception as error:
            return f"; {' '.join(str(error).split())}"
        return ""

    def _save(self, progress: Progress, asked: signal.Signals | None, over: bool) -> None:
        """Save where it is time to, on all ranks together; stop where one of them was asked to.

        Every rank is told by which signal: it reaches them in different steps, and some never.
        """
        import torch

        wanted = self.leads and (self.saver.due(progress.steps) or (over and self.plan.save.at_end))
        flags = torch.tensor([asked or 0, wanted], dtype=torch.int32, device=self.assembly.device)
        torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
        number, save = flags.tolist()
        stop = bool(number) and not over
        if (save or stop) and self.leads:
            self.directory.secure()
        if (save or stop) and (failure := self.saver.save(progress)):
            self.display.say(f"{failure}; step {progress.steps} is saved now")
        if stop:
            self.saver.close()
            at = f"step {progress.steps}, saved in {self.saver.newest()}"
            raise Stopped(f"stopped by {signal.Signals(number).name} after {at}; the same command goes on")

    def _facts(self) -> dict[str, str]:
        """What the opening tells beside the plugins; collective."""
        from dsplugins import counts

        run = self.assembly
        total, activated = counts.parameters(run.settings.model, run.chunks)
        batch = int(self.plan.train.global_batch.at(0, 0))
        parts = "MTP, embedding and head" if self.plugins.owner("mtp") else "embedding and head"
        return {
            "parameters": f"{total:,} total, {activated:,} activated a token (with {parts})",
            "tokens a step": f"{batch * self.plan.data.seq_length:,} at the start",
            "gradients": str(run.chain),
            **({"environment": ", ".join(needs)} if (needs := environment.told(self.plugins)) else {}),
            "data": ", ".join(f"{k} {v}" for k, v in run.data.facts.items()),
            "run directory": str(self.directory.path),
        }

    def _report(self, step: Step, over: bool) -> None:
        """The step's row in `metrics.jsonl`, with what events add, and its line where one is due."""
        row = as_row(step, self.plan.data.seq_length)
        for name, more in self.plugins.event("ds_step_end", step=step):
            add(row, name, more or {})
        if self.leads:
            self.directory.log(row)
        logged = step.step == 1 or step.step % self.plan.train.log_every == 0 or over
        self.display.step(step, row, logged)

    def _evaluate(self, done: int) -> None:
        from dsplugins.evaluate import evaluate

        self.evaluation = evaluate(self.assembly, done)
        self.plugins.event("ds_evaluated", evaluation=self.evaluation)
        # A run that died between its last evaluation and its end has this one already.
        if self.leads and done not in self.directory.evaluated():
            self.directory.log_evaluation(vars(self.evaluation))
        self.display.evaluation(self.evaluation, self.baselines, self.plan.evaluate.sequences)

    def _finish(self, done: int) -> None:
        """A completion, the plots, `run.json` and `status.json`; the process group ends."""
        import torch

        from dsplugins import footprint

        completion = self._completion()
        run = self.assembly
        memory = footprint.largest(footprint.measured(run.chunks, run.optimizer), run.device)
        if self.leads:
            path = self.directory.path
            # First: a picture that fails must not make the run one that has not ended.
            self.directory.note("run.json", self._summary(completion, memory))
            end = RunEnd(self.plan, path, done, self.evaluation, self.baselines, completion)
            for name, shown in self.plugins.event("ds_run_end", end=end):
                for key, value in (shown or {}).items():
                    self.display.say(f"{name}: {key}: {value}")
            self.directory.end(0, "complete", steps=done)
            self.display.say(f"done: {done} steps, everything is in {path}")
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()

    def _summary(self, completion: tuple[str, str, str] | None, memory: Footprint) -> dict[str, Any]:
        return {
            "evaluation": vars(self.evaluation) if self.evaluation else None,
            "baselines": self.baselines,
            "completion": completion,
            "memory": vars(memory),
            "peak_memory": self.assembly.platform.peak_memory(),
            "versions": versions(),
        }

    def _completion(self) -> tuple[str, str, str] | None:
        from dsplugins.completion import complete

        run = self.assembly
        prompt = run.data.prompt() if self.plan.evaluate.sequences else None
        if prompt is None:
            return None
        tokens, truth = prompt
        length = min(48, self.plan.data.seq_length // 4)
        with self.display.waiting(f"the model writes {length} tokens"):
            written = complete(run, tokens, length)
        texts = (run.data.decode(tokens), run.data.decode(written), truth)
        self.display.completion(*texts)
        return texts


def as_row(step: Step, seq_length: int) -> dict[str, Any]:
    """A step as `metrics.jsonl` holds it; null where the model has no such thing, or no finite one."""
    row = {
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
    return {key: _plain(value) for key, value in row.items()}


def add(row: dict[str, Any], name: str, more: Mapping[str, Any]) -> None:
    """Put what plugin `name` returned into a step's row.

    Raises HookFailure for a key that is there, and for what JSON can't hold.
    """
    try:
        json.dumps(dict(more))
    except (TypeError, ValueError) as error:
        said = TypeError(f"metrics.jsonl takes a mapping of names to plain numbers or text: {error}")
        raise HookFailure(name, "ds_step_end", said) from said
    for key, value in more.items():
        if key in row:
            taken = ValueError(f"metrics.jsonl has {key!r} already, from the loop or another plugin")
            raise HookFailure(name, "ds_step_end", taken) from taken
        row[key] = _plain(value)


def _plain(value: Any) -> Any:
    """JSON knows neither infinity nor NaN: null."""
    return None if isinstance(value, float) and not isfinite(value) else value


__all__ = ["Loop", "as_row", "train"]
