"""The training loop, readable top to bottom.

`train` prepares one rank (platform, process group, agreement of all ranks, settings, model, optimizer,
data) and runs the steps; hooks are called before the first step and at most once a step after it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsplugins.contracts import (
    EnvironmentUnfit,
    Evaluation,
    Plan,
    Problem,
    RecipeError,
    RunEnd,
    Settings,
    Step,
)
from dsplugins.manager import Plugins
from dsplugins.plan import prepare
from dsplugins.rundir import RunDirectory, versions
from dsplugins.show import Display

if TYPE_CHECKING:
    import torch

    from dsplugins.contracts import Data, Platform
    from dsplugins.recipe import Recipe


def train(recipe: Recipe) -> int:
    """One rank of a run; returns its exit code. Expects torchrun's environment variables."""
    rank = int(os.environ.get("RANK", "0"))
    plugins, plan = prepare(recipe)
    _right_world(plan)
    directory = RunDirectory(Path(plan.run.directory))
    display = Display(speaks=rank == 0)
    try:
        run = Run(recipe, plan, plugins, directory, display)
        run.steps()
    except BaseException as error:
        display.stop_bar()
        if rank == 0:
            code = 3 if isinstance(error, RecipeError) else 4 if isinstance(error, EnvironmentUnfit) else 1
            directory.end(code, f"{type(error).__name__}: {error}".splitlines()[0])
        raise
    run.finish()
    return 0


def _right_world(plan: Plan) -> None:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world != plan.run.world_size:
        raise EnvironmentUnfit(
            f"{world} processes were started, the recipe is for run.world_size={plan.run.world_size}: "
            f"start {plan.run.world_size}, or set run.world_size={world}"
        )


class Run:
    """One rank's share of a run: everything built, and the loop."""

    def __init__(
        self, recipe: Recipe, plan: Plan, plugins: Plugins, directory: RunDirectory, display: Display
    ) -> None:
        self.plan, self.plugins, self.directory, self.display = plan, plugins, directory, display
        self.platform: Platform = plugins.slot("platform", plan=plan)
        self.device = self.platform.prepare(int(os.environ.get("LOCAL_RANK", "0")))
        self.rank = start_process_group(self.platform)
        agree(recipe, plugins)

        from dsplugins import audit, model, routers, settings
        from dsplugins.finalize import GradientChain

        self.settings: Settings = settings.settle(plan, plugins, recipe)
        self.data: Data = plugins.slot("data", plan=plan)
        _fitting_data(plan, self.settings, self.data)
        model.start_groups(plan.layout, plan.train.seed)
        self.schedule = plugins.slot("schedule", plan=plan)
        self.forward_backward = self.schedule.forward_backward()
        self.chunks: list[Any] = model.build(plan, self.settings, plugins, self.device)
        plugins.event("ds_model_built", plan=plan, settings=self.settings, chunks=self.chunks)
        self.optimizer = plugins.slot("optimizer", config=self.settings.optimizer, chunks=self.chunks)
        self.balance = routers.Balance(self.settings.model, self.chunks)
        self.chain = GradientChain(self.schedule.finalize_grads(), self.balance)
        self._wire()
        audit.audit(plan, self.settings, plugins, self.chunks, self.optimizer)
        if self.rank == 0:
            directory.start(recipe, plugins)
        self.evaluation: Evaluation | None = None
        self.baselines = dict(self.data.baselines()) if plan.evaluate.sequences else {}
        display.opening(plan, plugins, self._facts())

    def _wire(self) -> None:
        """Hand megatron-core the callables that its schedules look for in the configuration."""
        config = self.settings.model
        self.configs = {
            id(c): c for chunk in self.chunks for m in chunk.modules() if (c := getattr(m, "config", None))
        }
        for each in self.configs.values():
            each.grad_scale_func = self.optimizer.scale_loss
            each.finalize_model_grads_func = self.chain
            several = len(self.chunks) > 1
            each.no_sync_func = [c.no_sync for c in self.chunks] if several else self.chunks[0].no_sync
        self.live = [c for c in self.configs.values() if isinstance(c, type(config))]

    def _facts(self) -> dict[str, str]:
        from dsplugins import counts

        total, activated = counts.parameters(self.settings.model, self.chunks)
        batch = int(self.plan.train.global_batch.at(0, 0))
        return {
            "parameters": f"{total:,} total, {activated:,} activated a token (with MTP, embedding and head)",
            "tokens a step": f"{batch * self.plan.data.seq_length:,} at the start",
            "gradients": str(self.chain),
            "data": ", ".join(f"{k} {v}" for k, v in self.data.facts.items()),
            "run directory": str(self.directory.path),
        }

    def steps(self) -> None:
        """Train to the end of the recipe."""
        train = self.plan.train
        done = consumed = 0
        length = self.plan.data.seq_length
        self.display.bar(train.steps or 0)
        while not _over(train, done, consumed * length):
            step, row = self._step(done, consumed)
            done, consumed = step.step, consumed + step.global_batch
            logged = done % train.log_every == 0 or done == 1 or _over(train, done, step.tokens)
            self._report(step, row, logged)
            every = self.plan.evaluate.every
            if every and done % every == 0 and not _over(train, done, step.tokens):
                self._evaluate(done)
        self.display.stop_bar()
        self.done = done
        if self.plan.evaluate.sequences:
            self._evaluate(done)

    def _step(self, done: int, consumed: int) -> tuple[Step, dict[str, Any]]:
        """One optimizer step; `done` steps and `consumed` sequences lie behind it."""
        from megatron.core import parallel_state

        from dsplugins.batches import forward_step, micro_batches

        plan, length = self.plan, self.plan.data.seq_length
        began = time.perf_counter()
        unit = plan.train.micro_batch * plan.layout.data
        batch = plan.train.global_batch.at_multiple(done, consumed * length, unit)
        rate = plan.train.learning_rate.at(done, consumed * length)
        scheduled = self._set_scheduled(done, consumed * length)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_mult", 1.0)
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        count = batch // unit
        ranks, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
        iterators = [
            micro_batches(self.data.train, consumed, count, plan.train.micro_batch, rank, ranks, self.device)
            for _ in self.chunks
        ]
        losses = self.forward_backward(
            forward_step_func=forward_step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.chunks,
            num_microbatches=count,
            seq_length=length,
            micro_batch_size=plan.train.micro_batch,
            forward_only=False,
        )
        self.plugins.event("ds_grads_ready", step=done + 1, chunks=self.chunks)
        updated, norm, _ = self.optimizer.step()
        loss, mtp, aux, expert_counts = self._sums(losses, count)
        self.platform.synchronize()
        seconds = time.perf_counter() - began
        step = self._result(done, consumed, batch, rate, scheduled, seconds, loss, mtp, aux, expert_counts)
        object.__setattr__(step, "grad_norm", float(norm) if norm is not None else float("nan"))
        object.__setattr__(step, "skipped", not updated)
        return step, self._row(step)

    def _set_scheduled(self, done: int, tokens: int) -> dict[str, float]:
        values = {name: schedule.at(done, tokens) for name, schedule in self.settings.scheduled.items()}
        for config in self.live:
            for name, value in values.items():
                setattr(config, name, value)
        return values

    def _sums(
        self, losses: Sequence[dict[str, Any]], count: int
    ) -> tuple[float, float | None, float | None, Any]:
        """Loss, MTP loss, balance loss and counts, the same on every rank: one small all-reduce a step."""
        import torch
        from megatron.core import parallel_state
        from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

        copies = self.plan.layout.data * self.plan.layout.context
        first = parallel_state.get_tensor_model_parallel_rank() == 0
        sums = torch.zeros(3 + self.balance.counts.numel(), dtype=torch.float64, device=self.device)
        if first and losses:
            sums[0] = torch.stack([row["loss"] for row in losses]).double().mean() / copies
            tracker = MTPLossLoggingHelper.tracker
            if "loss_values" in tracker:
                sums[1] = tracker["loss_values"].double().mean() / count / copies
        if first and parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0:
            sums[2] = self.balance.aux / count / self.plan.layout.data
            sums[3:] = self.balance.counts.flatten()
        MTPLossLoggingHelper.clean_metrics_in_tracker()
        torch.distributed.all_reduce(sums)
        numbers = sums.cpu()
        counts = (
            numbers[3:].round().to(torch.int64).view_as(self.balance.counts) if self.balance.names else None
        )
        mtp = float(numbers[1]) if self.settings.model.mtp_num_layers else None
        aux = float(numbers[2]) if self.balance.names else None
        return float(numbers[0]), mtp, aux, counts

    def _result(
        self,
        done: int,
        consumed: int,
        batch: int,
        rate: float,
        scheduled: dict[str, float],
        seconds: float,
        loss: float,
        mtp: float | None,
        aux: float | None,
        counts: torch.Tensor | None,
    ) -> Step:
        from dsplugins.routers import max_vio

        return Step(
            step=done + 1,
            tokens=(consumed + batch) * self.plan.data.seq_length,
            loss=loss,
            mtp_loss=mtp,
            aux_loss=aux,
            grad_norm=0.0,
            learning_rate=rate,
            global_batch=batch,
            scheduled=scheduled,
            expert_counts=counts,
            router_layers=self.balance.names,
            max_vio=max_vio(counts) if counts is not None else None,
            seconds=seconds,
            skipped=False,
        )

    def _row(self, step: Step) -> dict[str, Any]:
        tokens = step.global_batch * self.plan.data.seq_length
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
            "tokens_per_second": tokens / step.seconds,
            "step_seconds": step.seconds,
            "skipped": step.skipped,
        }

    def _report(self, step: Step, row: dict[str, Any], logged: bool) -> None:
        for _, more in self.plugins.event("ds_step_end", step=step):
            row.update(more or {})
        if self.rank == 0:
            self.directory.log(row)
        self.display.step(step, row, logged)

    def _evaluate(self, done: int) -> None:
        from dsplugins.evaluate import evaluate

        arguments = (self.plan, self.data, self.chunks, self.forward_backward, done, self.device)
        self.evaluation = evaluate(*arguments)
        self.plugins.event("ds_evaluated", evaluation=self.evaluation)
        self.display.evaluation(self.evaluation, self.baselines)

    def finish(self) -> None:
        """A completion, the plots, `run.json` and `status.json`; the process group ends."""
        import json

        import torch

        completion = self._completion()
        if self.rank == 0:
            end = RunEnd(
                self.plan, self.directory.path, self.done, self.evaluation, self.baselines, completion
            )
            for name, shown in self.plugins.event("ds_run_end", end=end):
                for key, value in (shown or {}).items():
                    self.display.say(f"{name}: {key}: {value}")
            facts = {
                "evaluation": vars(self.evaluation) if self.evaluation else None,
                "baselines": self.baselines,
                "completion": completion,
                "peak_memory": self.platform.peak_memory(),
                "versions": versions(),
            }
            (self.directory.path / "run.json").write_text(json.dumps(facts, indent=1) + "\n")
            self.directory.end(0, "complete", steps=self.done)
            self.display.say(f"done: {self.done} steps, everything is in {self.directory.path}")
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()

    def _completion(self) -> tuple[str, str, str] | None:
        from dsplugins.evaluate import complete

        prompt = self.data.prompt() if self.plan.evaluate.sequences else None
        if prompt is None:
            return None
        tokens, truth = prompt
        length = min(48, self.plan.data.seq_length // 4)
        written = complete(self.plan, tokens, length, self.chunks, self.forward_backward, self.device)
        texts = (self.data.decode(tokens), self.data.decode(written), truth)
        self.display.completion(*texts)
        return texts


def _over(train: Any, done: int, tokens: int) -> bool:
    return done >= train.steps if train.steps is not None else tokens >= train.tokens


def start_process_group(platform: Platform) -> int:
    """Join the other ranks; a single process without torchrun makes a group of one. Returns the rank."""
    import torch

    if "MASTER_ADDR" in os.environ:
        torch.distributed.init_process_group(platform.distributed_backend)
    else:
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group(platform.distributed_backend, store=store, rank=0, world_size=1)
    return torch.distributed.get_rank()


def agree(recipe: Recipe, plugins: Plugins) -> None:
    """All ranks have the same recipe, plugins and versions, or none starts. Raises EnvironmentUnfit."""
    import hashlib

    import torch

    mine = {
        "recipe": hashlib.sha256(recipe.resolved().encode()).hexdigest(),
        "plugins": plugins.digest(),
        "versions": str(sorted(versions().items())),
    }
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, mine)
    for what in mine:
        others = [rank for rank, theirs in enumerate(everyone) if theirs[what] != everyone[0][what]]
        if others:
            shown = ", ".join(map(str, others[:8]))
            raise EnvironmentUnfit(
                f"ranks {shown} have other {what} than rank 0: install and start the same everywhere"
            )


def _fitting_data(plan: Plan, settings: Settings, data: Data) -> None:
    problems = []
    if data.vocab_size > settings.vocab_size:
        owner = plan.slots["data"]
        said = f"model.vocab_size={settings.vocab_size} is less than the {data.vocab_size} tokens of {owner}"
        problems.append(Problem(said, "model.vocab_size", f"set it to {data.vocab_size} or more"))
    if plan.evaluate.sequences and data.validation_size < plan.train.micro_batch * plan.layout.data:
        said = f"{plan.slots['data']} has {data.validation_size} validation samples, fewer than one a rank"
        problems.append(Problem(said, "evaluate.sequences", "set it to 0 or shorten data.seq_length"))
    if problems:
        raise RecipeError(problems)
