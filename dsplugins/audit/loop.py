"""What the loop will call, against what the schedule slot gave."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

from dsplugins import routers

if TYPE_CHECKING:
    from dsplugins.audit.built import Built


def differences(run: Built) -> Iterable[str]:
    """Another forward-backward function or gradient chain, routers or configurations left out."""
    schedule = run.plugins.slot("schedule", plan=run.plan)
    owner = run.plan.slots["schedule"]
    yield from _other("forward-backward", run.forward_backward, schedule.forward_backward(), owner)
    yield from _other("gradient finalisation", run.chain.finalize_grads, schedule.finalize_grads(), owner)
    if run.chain.balance is not run.balance:
        yield "the chain before the optimizer does not end with the routers' balance"
    here, balanced = dict(routers.local(run.chunks)), dict(run.balance.routers)
    for name in here.keys() | balanced.keys():
        if here.get(name) is not balanced.get(name):
            yield f"{name}: its router is not the one whose counts are summed"
    known = {id(config) for config in run.configs}
    for name, router in here.items():
        if id(router.config) not in known:
            yield f"{name}: no schedule reaches its router's configuration"
    for config in run.configs:
        if config.finalize_model_grads_func is not run.chain:
            yield "megatron-core would not call the chain before the optimizer"
        if config.grad_scale_func != run.optimizer.scale_loss:
            yield "megatron-core would not scale the loss as the optimizer does"


def _other(what: str, stands: Any, chosen: Any, owner: str) -> Iterable[str]:
    if _code(stands) is not _code(chosen):
        names = _function(stands).__name__, _function(chosen).__name__
        if names[0] == names[1]:
            names = _in_full(stands), _in_full(chosen)
        yield f"{what} is {names[0]}, {owner} gave {names[1]}"


def _function(called: Any) -> Any:
    """What is behind a partial, a bound method or a callable object: asked twice, these are new objects."""
    while isinstance(called, partial):
        called = called.func
    called = getattr(called, "__func__", called)
    return called if inspect.isroutine(called) else type(called)


def _code(called: Any) -> Any:
    """What it runs: a function that is made anew at each call, a closure, has the same code each time."""
    function = _function(called)
    return getattr(function, "__code__", function)


def _in_full(called: Any) -> str:
    function = _function(called)
    return f"{function.__module__}.{function.__qualname__}"
