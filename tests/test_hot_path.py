"""P3: nothing in the hot path. Every call of every hook is counted while `train` runs, all events active."""

from __future__ import annotations

import contextlib
import io
import os
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

TINY = Path(__file__).parent / "tiny.yaml"
EVENTS = ["plugins.expert_load.every=1", "plugins.curves={}", "plugins.tensorboard={}"]
UNDRAWN = ["plugins.expert_load.plots=false", "plugins.curves.plots=false"]
LISTENERS = {"expert_load.ds_step_end", "tensorboard.ds_step_end"}
CASES = {
    "one process": (1, []),
    "EP2": (2, ["parallel.expert=2", "plugins.bytes_on_wire={}"]),
    "recomputed": (1, ["plugins.v3_recompute={}", "plugins.bf16={}", "plugins.fp32=null"]),
}


class Calls:
    """Hook calls inside and outside of forward and backward: a function stands before each of them."""

    def __init__(self) -> None:
        self.inside: Counter[str] = Counter()
        self.outside: Counter[str] = Counter()
        self.passes = 0
        self._within = False

    def watch(self, plugins: Any) -> None:
        """Stand before every hook that a chosen plugin fills, whoever calls it."""
        manager = plugins._manager
        for plugin in manager.get_plugins():
            for caller in manager.get_hookcallers(plugin) or ():
                for implementation in caller.get_hookimpls():
                    name = f"{implementation.plugin_name}.{caller.name}"
                    if implementation.plugin is plugin:
                        implementation.function = partial(self._called, name, implementation.function)

    def _called(self, name: str, function: Any, **arguments: Any) -> Any:
        (self.inside if self._within else self.outside)[name] += 1
        return function(**arguments)

    def passing(self, forward_backward: Any, **arguments: Any) -> Any:
        """One call of megatron-core's forward-backward function."""
        self.passes += 1
        self._within = True
        try:
            return forward_backward(**arguments)
        finally:
            self._within = False


@contextlib.contextmanager
def counting(calls: Calls) -> Iterator[None]:
    """Count in everything that is made and called here."""
    import torch
    from megatron.core.pipeline_parallel import schedules

    from dsplugins.manager import Plugins

    made, own = Plugins.__init__, schedules.forward_backward_no_pipelining

    def watched(self: Any, chosen: Any) -> None:
        made(self, chosen)
        calls.watch(self)

    with (
        mock.patch.object(Plugins, "__init__", watched),
        mock.patch.object(schedules, "forward_backward_no_pipelining", partial(calls.passing, own)),
        mock.patch.object(torch.distributed, "destroy_process_group"),  # the worker keeps its own
        contextlib.redirect_stdout(io.StringIO()),
    ):
        yield


def run(folder: str, overrides: list[str]) -> Calls:
    """`dsplugins train` of the tiny recipe on this worker's ranks."""
    import torch

    from dsplugins.recipe import Recipe
    from dsplugins.testing import temporary_groups
    from dsplugins.train import train

    world = torch.distributed.get_world_size()
    os.environ |= {"WORLD_SIZE": str(world), "RANK": str(torch.distributed.get_rank())}
    calls = Calls()
    where = [f"run.world_size={world}", f"run.directory={folder}"]
    pairs = ["train.micro_batch=2", "evaluate.sequences=4"]
    recipe = Recipe.load(TINY, [*EVENTS, *pairs, *overrides, *where])
    with temporary_groups(), counting(calls):
        train(recipe)
    return calls


def counted(folder: str, overrides: list[str]) -> tuple[Counter[str], Counter[str], int]:
    calls = run(folder, overrides)
    return calls.inside, calls.outside, calls.passes


def meddled(folder: str) -> Counter[str]:
    """A router that calls a hook in its forward: what must never be."""
    from dsplugins.contracts import Evaluation
    from dsplugins.manager import Plugins
    from dsplugins.plugins.router.aux_free_router import AuxFreeRouter

    made, own, seen = Plugins.__init__, AuxFreeRouter.routing, []

    def remembered(self: Any, chosen: Any) -> None:
        seen.append(self)
        made(self, chosen)

    def routing(self: Any, logits: Any) -> Any:
        seen[0].event("ds_evaluated", evaluation=Evaluation(0, 0.0, None, None, 0))
        return own(self, logits)

    with (
        mock.patch.object(Plugins, "__init__", remembered),
        mock.patch.object(AuxFreeRouter, "routing", routing),
    ):
        return run(folder, ["train.steps=1"]).inside


@pytest.mark.parametrize("case", CASES)
def test_no_hook_is_called_inside_forward_and_backward(workers, tmp_path, case):
    size, overrides = CASES[case]
    for inside, outside, passes in workers(size).run(counted, str(tmp_path), ["train.steps=3", *overrides]):
        assert passes >= 3 + 1, "three steps and an evaluation went by"
        assert not inside
        assert all(outside[name] == 3 for name in LISTENERS)


def test_a_call_inside_would_be_seen(workers, tmp_path):
    (inside,) = workers(1).run(meddled, str(tmp_path))
    assert inside["tensorboard.ds_evaluated"] >= 4 * 4, "each micro-batch, each router"


def test_calls_do_not_grow_with_micro_batches_and_one_a_step(workers, tmp_path):
    """Three more steps are three more calls of each listener; eight times the micro-batches are none."""
    found = {}
    for steps, batch in ((2, 8), (5, 8), (2, 64)):
        changes = [f"train.steps={steps}", f"train.global_batch={batch}", *UNDRAWN]
        ((_, outside, _),) = workers(1).run(counted, str(tmp_path / f"{steps}-{batch}"), changes)
        found[steps, batch] = outside
    assert found[2, 64] == found[2, 8]
    assert found[5, 8] - found[2, 8] == Counter(dict.fromkeys(LISTENERS, 3))
