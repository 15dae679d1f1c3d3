"""A loop that calls something else, layers that stand nowhere or twice."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest


def bare(run: Any) -> Any:
    from dsplugins.model import bare

    return bare(run.chunks[0])


def other_schedule(run: Any) -> Any:
    from megatron.core.pipeline_parallel import schedules

    return dataclasses.replace(
        run, forward_backward=schedules.forward_backward_pipelining_without_interleaving
    )


def other_finalisation(run: Any) -> None:
    run.chain.finalize_grads = print


def core_alone(run: Any) -> None:
    """What stands there when nobody sets it: gradients are final, biases never move."""
    from megatron.core.distributed import finalize_model_grads

    for config in run.configs:
        config.finalize_model_grads_func = finalize_model_grads


def unscaled(run: Any) -> None:
    run.settings.model.grad_scale_func = None


def other_balance(run: Any) -> None:
    run.chain.balance = copy.copy(run.balance)


def forgotten_router(run: Any) -> None:
    run.balance.routers.pop()


def own_config(run: Any) -> None:
    router = bare(run).decoder.layers[1].mlp.router
    router.config = copy.copy(router.config)


def no_layer(run: Any) -> None:
    del bare(run).decoder.layers[2]


def twice(run: Any) -> None:
    layers = bare(run).decoder.layers
    layers[2].layer_number = layers[3].layer_number


def no_final_norm(run: Any) -> None:
    bare(run).decoder.final_layernorm = None


def no_mtp(run: Any) -> None:
    bare(run).mtp = None


def other_layout(run: Any) -> None:
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    run.settings.model.pipeline_model_parallel_layout = PipelineParallelLayerLayout(
        [["embedding"], ["loss"]], 2
    )


SPOILT = {
    "forward-backward is forward_backward_pipelining_without_interleaving, one_f_one_b gave "
    "forward_backward_no_pipelining": other_schedule,
    "gradient finalisation is print, one_f_one_b gave finalize_model_grads": other_finalisation,
    "megatron-core would not call the chain": core_alone,
    "megatron-core would not scale the loss": unscaled,
    "the chain before the optimizer does not end with the routers' balance": other_balance,
    "mtp.0: its router is not the one whose counts are summed": forgotten_router,
    "decoder.1: no schedule reaches its router's configuration": own_config,
    "decoder.2 stands 0 times in the pipeline, wanted 1": no_layer,
    "decoder.3 stands 2 times in the pipeline, wanted 1": twice,
    "decoder.final_layernorm stands 0 times": no_final_norm,
    "mtp.0 stands 0 times in the pipeline, wanted 1": no_mtp,
    "pipeline layout is PipelineParallelLayerLayout, chosen was NoneType": other_layout,
}


def by_hand(said: str) -> list[str]:
    from audit.provoke import unaudited, verdict

    with unaudited() as run:
        return verdict(SPOILT[said](run) or run)


@pytest.mark.parametrize("said", SPOILT)
def test_another_loop(workers, said):
    (found,) = workers(1).run(by_hand, said)
    assert any(said in line for line in found), found


def lost_on_one_stage() -> list[str]:
    """Stage 0 of two loses a layer."""
    from audit.provoke import unaudited, verdict
    from megatron.core import parallel_state

    with unaudited("parallel.pipeline=2") as run:
        assert verdict(run) == []
        if parallel_state.is_pipeline_first_stage():
            del bare(run).decoder.layers[1]
        return verdict(run)


def test_all_stages_hear_of_a_lost_layer(workers):
    both = workers(2).run(lost_on_one_stage)
    assert both[0] == both[1]
    for found in both:
        assert "decoder.1 stands 0 times in the pipeline, wanted 1" in found


def closure(count: int = 1) -> Any:
    """As a schedule gives it that makes its function each time that it is asked."""

    def run(**kwargs: Any) -> list[int]:
        return [count]

    return run


def run(**kwargs: Any) -> None:
    """Another function of that name."""


def given_anew() -> list[list[str]]:
    """Schedules that give a fresh closure: of their own, and where the loop has something else."""
    from unittest import mock

    from audit.provoke import unaudited, verdict

    from dsplugins.plugins.schedule.one_f_one_b import OneFOneBSchedule

    with (
        mock.patch.object(OneFOneBSchedule, "forward_backward", lambda self: closure()),
        unaudited() as built,
    ):
        return [verdict(built), verdict(dataclasses.replace(built, forward_backward=run))]


def test_a_function_that_is_made_anew_is_the_schedules_own(workers):
    ((own, other),) = workers(1).run(given_anew)
    assert own == []
    assert other == [f"forward-backward is {__name__}.run, one_f_one_b gave {__name__}.closure.<locals>.run"]


def fresh_submodule() -> list[str]:
    """An attention whose spec has another class of one name each time."""
    from unittest import mock

    from audit.provoke import hook, unaudited, verdict

    from dsplugins.plugins.attention.mla import Mla

    own = Mla.ds_attention

    def ds_attention(self, config, backend):
        spec = own(self, config=config, backend=backend)
        spec.submodules.linear_proj = type("Mine", (spec.submodules.linear_proj,), {})
        return spec

    with mock.patch.object(Mla, "ds_attention", hook(ds_attention)), unaudited() as built:
        return verdict(built)


def test_two_classes_of_one_name_are_told_apart(workers):
    (found,) = workers(1).run(fresh_submodule)
    assert found == [
        f"decoder.0-3, mtp.0: linear_proj is not the class {__name__}.Mine that was chosen but another "
        "one of that name: make it once (functools.cache)"
    ]


def stopped() -> str:
    """The audit inside `assemble`, as a run does it."""
    from unittest import mock

    from runs import assembled

    from dsplugins import assemble, audit
    from dsplugins.cli import exits

    wiring = assemble._wire

    def spoilt(run, optimizer, chain):
        wiring(run, optimizer, chain)
        run.settings.model.moe_router_enable_expert_bias = True

    try:
        with mock.patch.object(assemble, "_wire", spoilt), assembled([]):
            return "it went on"
    except audit.AuditFailure as failure:
        assert exits.code_of(failure) == 3  # as `check` ends where it finds the same
        return str(failure)


def test_a_difference_stops_the_run(workers):
    (said,) = workers(1).run(stopped)
    assert said.startswith("what is built is not what was chosen: ")
    assert "biases would be updated twice" in said and "was to be False" in said
