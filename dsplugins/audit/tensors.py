"""Number formats of what was built: parameters, gradients, routers' buffers, optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from dsplugins import optimizer_groups, routers

if TYPE_CHECKING:
    from dsplugins.audit.built import Built, Standing

GATE = {"fp32": torch.float32, "fp64": torch.float64}


def differences(run: Built) -> Iterable[str]:
    """Tensors kept in another format than asked for. Collective over the data-parallel ranks."""
    yield from of_model(run)
    yield from _optimizer(run)


def of_model(run: Standing) -> Iterable[str]:
    """Those of the model alone."""
    config = run.settings.model
    yield from _parameters(run)
    for name, router in routers.local(run.chunks):
        for said in (*_counts(router, config), *_bias(router, config), *_gate(router, config)):
            yield f"{name}: {said}"


def _parameters(run: Standing) -> Iterable[str]:
    weight, gradient = run.settings.model.params_dtype, run.settings.ddp.grad_reduce_in_fp32
    for parameter, name in optimizer_groups.parameter_names(run.chunks).items():
        if parameter.is_floating_point() and parameter.dtype != weight:
            yield f"{name} is {_word(parameter)}, chosen was {_word(weight)}"
        summed = getattr(parameter, "main_grad", None)
        if summed is not None and gradient and summed.dtype != torch.float32:
            yield f"the gradient of {name} is summed in {_word(summed)}, chosen was float32"


def _word(value: Any) -> str:
    return str(getattr(value, "dtype", value)).removeprefix("torch.")


def _counts(router: Any, config: Any) -> Iterable[str]:
    counts = router._buffers.get("local_tokens_per_expert")
    if counts is None or tuple(counts.shape) != (config.num_moe_experts,):
        yield f"router {type(router).__name__} keeps no local_tokens_per_expert [E]"
    for name, buffer in router.named_buffers():
        if buffer.is_floating_point() and buffer.dtype.itemsize < 4:
            yield f"buffer {name} was narrowed to {_word(buffer)}: it stops counting, and loses small steps"


def _bias(router: Any, config: Any) -> Iterable[str]:
    """A router that moves its biases has some to save."""
    saved = [router._buffers[name] for name in router._buffers if name in router.state_dict()]
    if hasattr(router, "update_bias") and not any(b.numel() == config.num_moe_experts for b in saved):
        yield f"router {type(router).__name__} has update_bias, but no bias [E] among its saved buffers"


def _gate(router: Any, config: Any) -> Iterable[str]:
    """The format that affinities come out in, tried on one token."""
    if not hasattr(router, "gating"):
        return
    wanted = GATE.get(config.moe_router_dtype, config.params_dtype)
    token = torch.zeros(1, 1, config.hidden_size, dtype=config.params_dtype, device=router.weight.device)
    with torch.no_grad():
        logits = router.gating(token)
    if logits.dtype != wanted:
        yield f"the gate's logits are {_word(logits)}, chosen was {_word(wanted)}"


def _optimizer(run: Built) -> Iterable[str]:
    for name, (optimized, there) in optimizer_groups.miscounted(run.optimizer, run.chunks).items():
        yield f"optimizer: {name} has {there} elements, of which {optimized} are in a group"
    owner = run.plugins.owner("optimizer")
    moments = getattr(owner.plugin, "moments", None) if owner else None
    for group in optimizer_groups.describe(run.optimizer, run.chunks):
        of = f"the group of {group.names[0]}"
        if group.master != ("float32",):
            yield f"optimizer: {of} updates {' and '.join(group.master)} weights, not float32 ones"
        if moments is not None and group.moments and group.moments != (moments,):
            yield f"optimizer: {of} keeps moments in {' and '.join(group.moments)}, chosen was {moments}"
