"""When a run saves, and how it comes back: checkpoints of an assembly, in the background where asked."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from dsplugins import changes
from dsplugins.checkpoint import store
from dsplugins.checkpoint.pieces import Piece, optimizer_steps, pieces, set_optimizer_steps
from dsplugins.contracts import EnvironmentUnfit, Problem, RecipeError
from dsplugins.failures import HookFailure
from dsplugins.model import gather_weights
from dsplugins.rundir import RunDirectory, remedy, versions
from dsplugins.step import Progress

if TYPE_CHECKING:
    from dsplugins.assemble import Assembly
    from dsplugins.contracts import PluginState


class Saver:
    """Checkpoints of one run, in `folder`. Made on all ranks together."""

    def __init__(self, run: Assembly, folder: Path) -> None:
        self._run, self._folder, self._options = run, folder, run.plan.save
        # A group of its own: a background save must not meet the loop's collectives on the wire.
        timeout = timedelta(minutes=run.plan.run.timeout_minutes)
        self._group: Any = dist.new_group(backend="gloo", timeout=timeout)
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[store.Checkpoint] | None = None
        self._saved_at = time.monotonic()
        self._step = -1
        self._states = _states(run.plugins.event("ds_state"))

    def resume(self, fresh: bool = False, accept: bool = False) -> tuple[Progress, list[str]]:
        """Fill the assembly from the newest good checkpoint; where the run stands, and what to tell.

        Collective. Without a checkpoint the run stands at its start; `fresh` removes those that are there.
        Raises EnvironmentUnfit where that can't be done, and where there are checkpoints and none is whole;
        RecipeError where the data is other than the checkpoint's, unless `accept`.
        """
        if fresh:
            self._first(lambda: store.clear(self._folder))
            return Progress(), []
        self._first(lambda: store.clear_partial(self._folder))
        found, told = store.newest_good(self._folder, self._group)
        if found is None and told:
            raise EnvironmentUnfit(f"{'; '.join(told)}; mend one, or start over with --fresh")
        if found is None:
            return Progress(), told
        step, facts = found.step, found.manifest()
        told += self._other_data(found, facts.get("data", {}), accept)
        self._first(lambda: store.set_aside(self._folder, step))
        if left := store.load(found, self._pieces(), self._group):
            told.append(f"left out, since this model has no such thing: {_listed(left)} of {found.path.name}")
        set_optimizer_steps(self._run.chunks, self._run.optimizer, facts["optimizer_steps"])
        self._step = found.step
        told += self._give_back(found, facts["plugins"])
        return Progress(**facts["progress"]), [*told, f"resumed from {found.path}"]

    def _other_data(self, found: store.Checkpoint, saved: dict[str, str], accept: bool) -> list[str]:
        """What is told of data that is accepted."""
        differing = changes.of_data(saved, self._run.data.facts)
        if differing and not accept:
            key, remedy = f"plugins.{self._run.plan.slots['data']}", changes.REMEDY
            said = (f"{found.path} was trained on other data: {change}" for change in differing)
            raise RecipeError([Problem(each, key, remedy) for each in said])
        return [f"accepted: {change}" for change in differing]

    def _first(self, work: Callable[[], object]) -> None:
        """Let rank 0 do something to the folder; what goes wrong there is raised on all ranks."""
        try:
            store.together(self._group, lambda: work() if self._run.rank == 0 else None)
        except OSError as error:
            raise EnvironmentUnfit(f"{self._folder}: {error}") from error

    def _give_back(self, found: store.Checkpoint, saved: dict[str, Any]) -> Iterator[str]:
        """Plugins' state, to those that are here; what is gone or new is told."""
        for name, kept in saved.items():
            state = self._states.get(name)
            if state is None:
                yield f"plugin {name} is not in this run: its state in {found.path.name} is left out"
            elif state.version != kept["version"]:
                raise EnvironmentUnfit(
                    f"plugin {name} saved its state in version {kept['version']} and now takes "
                    f"{state.version}: install the version that it was saved with, or start over with --fresh"
                )
            else:
                state.load(kept["state"])
        for name in self._states.keys() - saved.keys():
            yield f"plugin {name} starts without state: {found.path.name} has none of it"

    def due(self, step: int) -> bool:
        """Whether it is time to save after `step`; only rank 0's clock counts, for all."""
        by_steps = bool(self._options.every) and step % self._options.every == 0
        elapsed = time.monotonic() - self._saved_at
        return by_steps or bool(self._options.minutes) and elapsed >= 60 * self._options.minutes

    def save(self, progress: Progress) -> str | None:
        """Save; in the background if the recipe says so. What went wrong with the last one, or None.

        After a failure this one is made in the foreground: what was in the way may be gone, and if it isn't,
        EnvironmentUnfit is raised here.
        """
        if progress.steps == self._step:
            return None
        failure = self._last_failure()
        self._saved_at, self._step = time.monotonic(), progress.steps
        facts = {
            "progress": vars(progress),
            "optimizer_steps": optimizer_steps(self._run.chunks, self._run.optimizer),
            "layout": vars(self._run.plan.layout),
            "data": changes.data_of(self._run.data.facts),
            "plugins": {name: _state(name, state) for name, state in self._states.items()},
            "versions": versions(),
        }
        gather_weights(self._run.chunks)
        held = self._pieces()
        if self._options.asynchronous and failure is None:
            held = [replace(piece, data=piece.data.to("cpu", copy=True)) for piece in held if piece.main]
            self._writing = self._writer.submit(self._write, progress.steps, held, facts)
        else:
            self._write(progress.steps, held, facts)
        return failure

    def _last_failure(self) -> str | None:
        """What went wrong with the save in the background, the same on all ranks."""
        try:
            self.wait()
        except EnvironmentUnfit as error:
            return str(error)
        return None

    def wait(self) -> None:
        """Until nothing is being written; raises what went wrong. On all ranks or on none."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def newest(self) -> Path | None:
        """Path of the newest checkpoint that counts."""
        found = store.finished(self._folder)
        return found[0].path if found else None

    def close(self) -> None:
        """Finish what is being written."""
        self.wait()
        self._writer.shutdown()

    def _pieces(self) -> list[Piece]:
        return pieces(self._run.chunks, self._run.optimizer)

    def _write(self, step: int, held: Sequence[Piece], facts: dict[str, Any]) -> store.Checkpoint:
        try:
            checkpoint = store.save(self._folder, step, held, facts, self._group)
        except OSError as error:  # the same on all ranks
            said = f"checkpoint of step {step}: {error}; {remedy(str(error))}"
            kept = self.newest() or "the start, as no checkpoint was finished before"
            raise EnvironmentUnfit(f"{said}, and the same command goes on from {kept}") from error
        if self._run.rank == 0:
            with suppress(EnvironmentUnfit):
                RunDirectory(self._folder.parent).note("saved.json", {"step": step, "time": time.time()})
            with suppress(OSError):  # the new one counts; what is left of an old one goes at the next start
                store.prune(self._folder, self._options.keep, self._options.keep_every)
        return checkpoint


def _listed(names: Sequence[str], shown: int = 3) -> str:
    """`weights/a, weights/b, optimizer/a and 5 more`."""
    first = sorted(names, key=lambda name: not name.startswith("weights/"))[:shown]
    return ", ".join(first) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def _states(given: Iterable[tuple[str, Any]]) -> dict[str, PluginState]:
    """What plugins keep, by name. Raises HookFailure now for what couldn't be saved later."""
    states = {name: state for name, state in given if state is not None}
    for name, state in states.items():
        _state(name, state)
    return states


def _state(name: str, state: PluginState) -> dict[str, Any]:
    """A plugin's state as it is now, a copy. Raises HookFailure for what JSON can't hold."""
    try:
        return {"version": state.version, "state": json.loads(json.dumps(dict(state.save())))}
    except (TypeError, ValueError) as error:
        raise HookFailure(name, "ds_state", error) from error


__all__ = ["Saver"]
