"""Tokens to experts and back on real ranks: outputs and gradients of one rank, whatever the layout."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from oracles.dispatch import CASES, DISPATCHERS, EXPERTS, E, expected, routed, through, whole

from dsplugins.contracts import Layout
from dsplugins.plugins.dispatcher.alltoall import AllToAll
from dsplugins.plugins.dispatcher.fp8_alltoall import Fp8AllToAll


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("dispatcher", DISPATCHERS)
@pytest.mark.parametrize("expert", [1, 2])
def test_layouts_agree(workers, expert, dispatcher, experts, case):
    """EP 1 and 2 give the plain sum; a rank whose experts get nothing takes part in backward."""
    ranks = workers(2).run(through, dispatcher, experts, expert, case)
    wanted = expected(case)
    for name, value in whole(ranks).items():
        assert (value - wanted[name]).norm() < 2e-6 * wanted[name].norm(), name
    idle = expert == 2 and case == "all to the first rank"
    assert all(g is not None for rank in ranks for g in rank["weights"])
    assert any(g.any() for g in ranks[1]["weights"]) is not idle


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dispatcher", DISPATCHERS)
def test_experts_cut_over_two_ranks(workers, dispatcher, case):
    """Expert tensor parallel, with core's sequential experts."""
    ranks = workers(2).run(through, dispatcher, "sequential", 1, case, expert_tensor=2)
    wanted = expected(case)
    for name, value in whole(ranks).items():
        assert (value - wanted[name]).norm() < 2e-6 * wanted[name].norm(), name


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
def test_grouped_and_sequential_agree_to_the_bit(workers, dispatcher):
    results = [workers(2).run(through, dispatcher, experts, 2, "spread") for experts in EXPERTS]
    first, second = map(whole, results)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_one_rank_sorts_once(single):
    """What core's own dispatcher gives, bit for bit, without its second sort of what is sorted already."""
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
    from oracles.tiny_moe import groups, moe_config

    config = moe_config()
    given = []
    for factory in (AllToAll().ds_dispatcher(config), MoEAlltoAllTokenDispatcher):
        carrier = factory(E, list(range(E)), config=config, pg_collection=groups())
        tokens, probs, routing_map = routed("spread")
        tokens.requires_grad_()
        sent, scale = carrier.token_dispatch(*carrier.dispatch_preprocess(tokens, routing_map, probs))
        sorted_, counts, sorted_scale = carrier.dispatch_postprocess(sent, scale)
        back = carrier.combine_preprocess(sorted_ * sorted_scale.unsqueeze(-1))
        output = carrier.combine_postprocess(carrier.token_combine(back))
        output.square().sum().backward()
        given.append([sorted_, counts, sorted_scale, output, tokens.grad])
        copied = sorted_.data_ptr() != sent.data_ptr()
        assert copied is (factory is MoEAlltoAllTokenDispatcher)
    assert all(torch.equal(mine, cores) for mine, cores in zip(*given, strict=True))


def test_on_a_device_core_waits_itself(single, monkeypatch):
    """Also at the points where the counts have left the device and only the wait is to be done."""
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
    from oracles.tiny_moe import groups, moe_config

    points = []

    def stock(self, point, tokens_per_expert=None):
        points.append(point)
        return tokens_per_expert

    monkeypatch.setattr(MoEAlltoAllTokenDispatcher, "_maybe_dtoh_and_synchronize", stock)
    config = moe_config()
    carrier = AllToAll().ds_dispatcher(config)(E, list(range(E)), config=config, pg_collection=groups())
    carrier.probs = SimpleNamespace(is_cuda=True)
    on_cpu = torch.zeros(E)
    for point in ("before_permutation_1", "before_ep_alltoall", "before_finish"):
        carrier._maybe_dtoh_and_synchronize(point, on_cpu)
    assert points == ["before_permutation_1", "before_ep_alltoall", "before_finish"]
    carrier.probs = torch.zeros(1)
    carrier._maybe_dtoh_and_synchronize("before_finish", on_cpu)
    assert len(points) == 3


def test_settings_and_problems():
    for name, plugin in DISPATCHERS.items():
        assert plugin.ds_settings(SimpleNamespace()) == {"model.moe_token_dispatcher_type": name}
    found = [refused(overlap) for overlap in (False, True)]
    assert found[0] == [] and found[1][0].key == "model.moe_shared_expert_overlap"


def refused(overlap=False, platform="cpu", plugin=None, **layout):
    plan = SimpleNamespace(slots={"platform": platform}, layout=Layout(world_size=4, **layout))
    settings = SimpleNamespace(model=SimpleNamespace(moe_shared_expert_overlap=overlap))
    return list((plugin or AllToAll()).ds_check(plan, settings))


@pytest.mark.parametrize("plugin", [AllToAll(), Fp8AllToAll()])
def test_what_gloo_cannot_gather_is_refused(plugin):
    """Four ranks of which two share each expert crash in the first step."""
    (problem,) = refused(plugin=plugin, tensor=2, expert=2, expert_tensor=2)
    assert problem.key == "parallel.expert_tensor" and "gloo" in problem.message
    assert (
        refused(plugin=plugin, tensor=2, expert=2) == refused(plugin=plugin, tensor=2, expert_tensor=2) == []
    )
    assert refused(plugin=plugin, platform="cuda", tensor=2, expert=2, expert_tensor=2) == []
