"""The classic router against megatron-core's."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from dsplugins.plugins.router.aux_loss import AuxLoss, AuxLossOptions
from dsplugins.schedules import Schedule

PLUGIN = AuxLoss(AuxLossOptions())
S, B, H, E, K = 12, 3, 64, 16, 4

WAYS = {
    "sigmoid": {"moe_router_score_function": "sigmoid"},
    "softmax": {"moe_router_score_function": "softmax"},
    "pre_softmax": {"moe_router_score_function": "softmax", "moe_router_pre_softmax": True},
}
PLAIN = {"moe_router_num_groups": None, "moe_router_group_topk": None}


def build(**changes):
    from oracles.tiny_moe import moe_config, router

    return router(PLUGIN, moe_config(**changes))


def hidden(seed: int = 1) -> torch.Tensor:
    from oracles.tiny_moe import noise

    return noise(S, B, H, seed=seed)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("groups", [(4, 2), (None, None)])
@pytest.mark.parametrize("topk", [1, 4])
def test_routing_equals_core(single, way, groups, topk):
    """Bit for bit TopKRouter: probs, map, gradients of gate and input."""
    from oracles.tiny_moe import core_router, moe_config, noise

    kept = min(groups[1], topk) if groups[1] else None
    shared = WAYS[way] | {"moe_router_num_groups": groups[0], "moe_router_group_topk": kept}
    shared |= {"moe_router_topk": topk}
    if way == "softmax" and topk == 1:
        pytest.skip("megatron-core refuses it: the softmax over one expert is 1")
    ours = build(**shared)
    theirs = core_router(moe_config(**shared), ours)
    results = []
    for built in (ours, theirs):
        x = hidden().requires_grad_()
        probs, routing_map = built(x)
        (probs * noise(S * B, E, seed=9)).sum().backward()
        results.append((probs, routing_map, built.weight.grad, x.grad))
    for mine, core in zip(*results, strict=True):
        assert torch.equal(mine, core)
    assert ours.local_tokens_per_expert.sum() == S * B * topk


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("per_token", [False, True])
def test_loss_equals_core_without_groups(single, way, per_token):
    from oracles.tiny_moe import balance_gradient, core_router, moe_config

    shared = WAYS[way] | PLAIN | {"moe_aux_loss_coeff": 0.1, "calculate_per_token_loss": per_token}
    ours = build(**shared)
    theirs = core_router(moe_config(**shared, moe_router_load_balancing_type="aux_loss"), ours)
    for mine, core in zip(balance_gradient(ours, hidden()), balance_gradient(theirs, hidden()), strict=True):
        assert core.abs().max() > 0
        assert (mine - core).norm() < 1e-5 * core.norm()


def test_loss_counts_what_was_sent(single):
    """With groups f is the share that each expert really got, over the whole micro-batch."""
    built, x = build(moe_aux_loss_coeff=0.1), hidden()
    probs, routing_map = built(x)
    probs.sum().backward()
    scores = torch.sigmoid(x.double().view(-1, H) @ built.weight.double().T).detach()
    frequency = routing_map.double().mean(0) * E / K
    share = (scores / scores.sum(-1, keepdim=True)).mean(0)
    expected = float(0.1 * (frequency * share).sum())
    assert built.aux_loss_sum.item() == pytest.approx(expected, rel=1e-6)


def test_the_loss_balances(single):
    """Descending it alone evens out the affinities; with coefficient 0 the gate has no gradient."""
    from oracles.tiny_moe import balance_gradient

    built, x = build(moe_aux_loss_coeff=1.0, **PLAIN), hidden()
    history = []
    for _ in range(60):
        built.aux_loss_sum.zero_()
        gradient, _ = balance_gradient(built, x)
        history.append(built.aux_loss_sum.item())
        built.weight.data -= gradient
    assert history[-1] < 0.5 * (history[0] + 1.0)  # 1 is balance
    assert not balance_gradient(build(moe_aux_loss_coeff=0.0), x)[0].any()


def split_over_ranks(tensor: int) -> tuple[torch.Tensor, float]:
    """Balance gradient of the gate and loss, summed over ranks."""
    from oracles.tiny_moe import balance_gradient

    from dsplugins.testing import model_parallel

    with model_parallel(tensor=tensor):
        built = build(moe_aux_loss_coeff=0.1, tensor_model_parallel_size=tensor)
        gate, _ = balance_gradient(built, hidden().chunk(tensor)[built.tp_group.rank()])
        sums = torch.cat([gate.flatten(), built.aux_loss_sum.view(1)])
        torch.distributed.all_reduce(sums, group=built.tp_group)
    return sums[:-1], sums[-1].item()


def test_tensor_parallel_equals_one_rank(workers):
    gate, loss = workers(2).run(split_over_ranks, 1)[0]
    for split, total in workers(2).run(split_over_ranks, 2):
        assert (split - gate).norm() < 1e-5 * gate.norm()
        assert total == pytest.approx(loss, rel=1e-6)


def test_state_has_no_bias(single):
    built = build()
    assert built.state_dict().keys() == {"weight"}
    assert not hasattr(built, "update_bias")


def test_settings_and_problems():
    coeff = Schedule.constant(0.01)
    written = AuxLoss(AuxLossOptions(coeff=coeff, score="softmax")).ds_settings(SimpleNamespace())
    assert written["model.moe_aux_loss_coeff"] is coeff
    assert written["model.moe_router_score_function"] == "softmax"
    from oracles.tiny_moe import moe_config

    config = moe_config(moe_router_group_topk=3, moe_z_loss_coeff=1e-3)
    found = PLUGIN.ds_check(SimpleNamespace(), SimpleNamespace(model=config))
    assert [p.key for p in found] == ["model.moe_z_loss_coeff", "model.moe_router_group_topk"]
