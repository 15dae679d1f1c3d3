"""One part of `experiment gpu`: `python -m ...gpu_part ANSWER PART ROUNDS KEY=VALUE ...`."""

from __future__ import annotations

import fcntl
import importlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsplugins.experiments.gpu import STEP
from dsplugins.quiet import quiet

if TYPE_CHECKING:
    from dsplugins.contracts import Platform
    from dsplugins.experiments.gpu_layer import Layer

IN_A_ROW = 10
"""Calls of a kernel between two looks at the clock: starting one takes as long as a small one runs."""
WARM = 3
"""Rounds before any is timed."""


def step(overrides: Sequence[str], rounds: int) -> dict[str, Any]:
    """Steps of ours and of a hand-written loop, in turn."""
    from dsplugins import process_group
    from dsplugins.plan import prepare
    from dsplugins.recipe import Recipe

    recipe = Recipe.load(STEP, overrides)
    plugins, plan = prepare(recipe)
    platform, device = process_group.stand(plan, plugins)
    from dsplugins.assemble import assemble
    from dsplugins.bench import loop

    timed = loop.measure(assemble(recipe, plan, plugins, platform, device), rounds)
    return {**timed.results(("dsplugins", "hand_written")), "peak_memory": platform.peak_memory()}


def moe_layer(overrides: Sequence[str], rounds: int) -> dict[str, Any]:
    """The layer with all experts."""
    from dsplugins.experiments.gpu_layer import build

    layer = build(overrides)
    return _module(layer, layer.module.mlp, rounds)


def mla_block(overrides: Sequence[str], rounds: int) -> dict[str, Any]:
    """The attention block."""
    from dsplugins.experiments.gpu_layer import FEW, build

    layer = build([*FEW, *overrides])
    return _module(layer, layer.module.self_attention, rounds, None)


def attention(overrides: Sequence[str], rounds: int) -> dict[str, Any]:
    """Core attention through each path: seconds, and errors against math in FP32."""
    from dsplugins.experiments import gpu_attention as kernels
    from dsplugins.experiments.gpu_layer import FEW, build

    layer = build([*FEW, *overrides])
    core, given = layer.module.self_attention.core_attention, kernels.inputs(layer)
    exact, rows = kernels.reference(given), []
    free = layer.plan.slots["backend"] == "torch_local" and core.kernels is None
    for path in (kernels.OWN, *(kernels.PATHS if free else ())):
        try:
            found = kernels.errors(kernels.passes(core, path, given), exact)
            seconds = timed(partial(kernels.passes, core, path, given), layer.platform, rounds)
        except RuntimeError as error:  # torch has no such kernel for these sizes, or no memory for it
            rows.append({"path": path, "unavailable": str(error).splitlines()[0]})
        else:
            rows.append({"path": path, **_seconds(seconds), "errors": found})
    return {"paths": rows}


def few_experts(overrides: Sequence[str], rounds: int) -> dict[str, Any]:
    """The layer with as few experts as V3's groups allow, so that each has some 2,000 tokens."""
    from dsplugins.experiments.gpu_layer import FEW, build

    layer = build([*FEW, *overrides])
    return _module(layer, layer.module.mlp, rounds)


def products(overrides: Sequence[str], rounds: int) -> dict[str, Any]:
    """Those of the plugin of the slot precision."""
    return _own("products", overrides, rounds)


def casts(overrides: Sequence[str], rounds: int) -> dict[str, Any]:
    """Those of the plugin of the slot precision."""
    return _own("casts", overrides, rounds)


def _own(what: str, overrides: Sequence[str], rounds: int) -> dict[str, Any]:
    """What a number format measures of itself, by a clock that looks once for many calls."""
    from dsplugins import process_group
    from dsplugins.experiments.gpu_layer import alone

    _, plugins, plan = alone(overrides)
    platform, device = process_group.stand(plan, plugins)
    process_group.start(platform, plan)

    def clock(once: Callable[[], object]) -> list[float]:
        def often() -> None:
            for _ in range(IN_A_ROW):
                once()

        return [seconds / IN_A_ROW for seconds in timed(often, platform, rounds)]

    plugin: Any = next(item.plugin for item in plugins if item.slot == "precision")
    return dict(plugin.measures()[what](device, clock))


def _module(layer: Layer, module: Any, rounds: int, *more: Any) -> dict[str, Any]:
    """Forward and backward of `module`, a part of the layer, on the recipe's tokens, as in a run: inside the
    layer's autocast, weight gradients added where DDP sums them.
    """
    wrapped = layer.wrapped()
    hidden, gradient = layer.tokens(1).requires_grad_(), layer.tokens(2)

    def once() -> None:
        hidden.grad = None
        with layer.module.get_inner_quantization_context():
            output = module(hidden, *more)[0]
        output.backward(gradient)

    once()
    _in_its_format(layer.settings.model, module)
    wrapped.zero_grad_buffer()
    return {
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "tokens": hidden.shape[0] * hidden.shape[1],
        **_seconds(timed(once, layer.platform, rounds)),
        "peak_memory": layer.platform.peak_memory(),
    }


def _in_its_format(config: Any, module: Any) -> None:
    """Refuse to time BF16 under the name of TransformerEngine's FP8: after a pass its linears tell."""
    if not config.fp8:
        return
    linears = {name: m for name, m in module.named_modules() if hasattr(m, "fp8_initialized")}
    plain = [name for name, linear in linears.items() if not linear.fp8]
    if plain or not linears:
        raise RuntimeError(f"model.fp8={config.fp8}, but in BF16: {', '.join(plain) or 'everything'}")


def timed(once: Callable[[], object], platform: Platform, rounds: int) -> list[float]:
    """Seconds of `rounds` calls, each to its end on the device."""
    seconds = []
    for _ in range(WARM + rounds):
        platform.synchronize()
        began = time.perf_counter()
        once()
        platform.synchronize()
        seconds.append(time.perf_counter() - began)
    return seconds[WARM:]


def _seconds(seconds: Sequence[float]) -> dict[str, Any]:
    return {"seconds_median": statistics.median(seconds), "seconds": list(seconds)}


PARTS: dict[str, Callable[[Sequence[str], int], dict[str, Any]]] = {
    "step": step,
    "moe_layer": moe_layer,
    "mla_block": mla_block,
    "attention": attention,
    "few_experts": few_experts,
    "products": products,
    "casts": casts,
}


def main(answer: Path, part: str, rounds: int, overrides: list[str]) -> None:
    """Measure, and leave the numbers as JSON."""
    quiet()
    import torch

    if torch.cuda.is_available():  # a CPU's platform comes before megatron-core
        importlib.import_module("dsplugins.assemble")
    turn = (answer.parent / "turn").open("w")
    fcntl.flock(turn, fcntl.LOCK_EX)  # commands that share a folder share a GPU; ours until this process ends
    if answer.exists():
        return
    found = PARTS[part](overrides, rounds)
    torch.distributed.destroy_process_group()
    partial = answer.with_suffix(".partial")
    partial.write_text(json.dumps(found))
    os.replace(partial, answer)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4:])
