"""Number formats that were not asked for, of weights, gradients, buffers and the optimizer's state."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
from audit.provoke import BF16

PLAIN = "plugins.adamw.zero=false"
"""Without ZeRO the optimizer's own lists are the parameters."""


def bare(run: Any) -> Any:
    from dsplugins.model import bare

    return bare(run.chunks[0])


def inner(run: Any) -> Any:
    from dsplugins import optimizer_groups

    return next(optimizer_groups.leaves(run.optimizer)).optimizer


def narrow_weight(run: Any) -> None:
    weight = bare(run).decoder.layers[1].input_layernorm.weight
    weight.data = weight.data.bfloat16()


def narrow_gradient(run: Any) -> None:
    weight = bare(run).mtp.layers[0].eh_proj.weight
    weight.main_grad = weight.main_grad.bfloat16()


def widen_moments(run: Any) -> None:
    """What torch does when it loads a state: moments take the type of their parameter."""
    import torch

    torch.optim.Optimizer.load_state_dict(inner(run), inner(run).state_dict())


def narrow_masters(run: Any) -> None:
    for group in inner(run).param_groups:
        for main in group["params"]:
            main.data = main.data.bfloat16()


def leave_one_out(run: Any) -> None:
    inner(run).param_groups[0]["params"].pop()


def optimize_a_stranger(run: Any) -> None:
    import torch

    inner(run).param_groups[0]["params"].append(torch.nn.Parameter(torch.zeros(3)))


def drop_counts(run: Any) -> None:
    del bare(run).mtp.layers[0].mtp_model_layer.mlp.router.local_tokens_per_expert


def forget_bias(run: Any) -> None:
    """A bias that is not saved starts at zero again with each start."""
    bare(run).mtp.layers[0].mtp_model_layer.mlp.router._non_persistent_buffers_set.add("expert_bias")


SPOILT: dict[str, tuple[Any, list[str]]] = {
    "0.decoder.layers.1.input_layernorm.weight is bfloat16, chosen was float32": (narrow_weight, []),
    "the gradient of 0.mtp.layers.0.eh_proj.weight is summed in bfloat16": (narrow_gradient, []),
    "keeps moments in float32, chosen was bfloat16": (widen_moments, ["plugins.adamw.moments=bf16"]),
    "updates bfloat16 weights, not float32 ones": (narrow_masters, [*BF16, PLAIN]),
    "elements, of which 0 are in a group": (leave_one_out, [PLAIN]),
    "(not in the model) has 0 elements, of which 3 are in a group": (optimize_a_stranger, [PLAIN]),
    "mtp.0: router AuxFreeRouter keeps no local_tokens_per_expert": (drop_counts, []),
    "mtp.0: router AuxFreeRouter has update_bias, but no bias [E] among its saved": (forget_bias, []),
}


def by_hand(said: str) -> tuple[list[str], list[str]]:
    """What is found before and after."""
    from audit.provoke import unaudited, verdict

    spoil, overrides = SPOILT[said]
    with unaudited(*overrides) as run:
        before = verdict(run)
        spoil(run)
        return before, verdict(run)


@pytest.mark.parametrize("said", SPOILT)
def test_another_format(workers, said):
    ((before, found),) = workers(1).run(by_hand, said)
    assert before == []
    assert any(said in line for line in found), found


# -- what megatron-core does by itself -------------------------------------------------------------


def with_router(**changes: Any) -> list[str]:
    """In bf16, with other methods in the router."""
    from audit.provoke import unaudited, verdict

    from dsplugins.plugins.router.gate import CountingRouter

    with mock.patch.multiple(CountingRouter, **changes), unaudited(*BF16) as run:
        return verdict(run)


def narrowed_buffers() -> list[str]:
    """Float16Module narrows whatever a module holds."""
    import torch

    return with_router(_apply=torch.nn.Module._apply)


def narrow_gate() -> list[str]:
    """A gate that multiplies in the format of its weight."""
    import torch

    return with_router(gating=lambda self, input: torch.nn.functional.linear(input, self.weight))


def test_buffers_narrowed_by_the_bf16_wrapper(workers):
    (found,) = workers(1).run(narrowed_buffers)
    for place in ("decoder.1", "mtp.0"):
        assert any(line.startswith(f"{place}: buffer expert_bias was narrowed to bfloat16") for line in found)


def test_a_gate_in_half_precision(workers):
    (found,) = workers(1).run(narrow_gate)
    assert [line.split(":")[0] for line in found] == ["decoder.1", "decoder.2", "decoder.3", "mtp.0"]
    assert all("the gate's logits are bfloat16, chosen was float32" in line for line in found)


def in_bf16() -> list[str]:
    from audit.provoke import unaudited, verdict

    with unaudited(*BF16, "plugins.adamw.moments=bf16") as run:
        return verdict(run)


def test_bf16_itself_is_fine(workers):
    assert workers(2).run(in_bf16) == [[], []]
