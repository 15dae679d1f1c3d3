"""Tokens to experts and back on real ranks: outputs and gradients of one rank, whatever the layout."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from dsplugins.plugins.dispatcher.allgather import AllGather
from dsplugins.plugins.dispatcher.alltoall import AllToAll
from dsplugins.plugins.experts.grouped import Grouped
from dsplugins.plugins.experts.sequential import Sequential

T, H, E, K = 10, 64, 16, 4
DISPATCHERS = {"alltoall": AllToAll(), "allgather": AllGather()}
EXPERTS = {"sequential": Sequential(), "grouped": Grouped()}


def routed(case: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens [2T, 1, H], probs and map [2T, E] of both ranks together."""
    from oracles.tiny_moe import noise

    scores = torch.sigmoid(noise(2 * T, E, seed=2))
    if case == "all to the first rank":
        scores[:, E // 2 :] = 0
    chosen = scores.topk(K, dim=1).indices
    routing_map = torch.zeros(2 * T, E, dtype=torch.bool).scatter(1, chosen, True)
    return noise(2 * T, 1, H, seed=1), scores * routing_map, routing_map


def experts_of(plugin, config, first: int):
    """This rank's experts, weights by global number."""
    from oracles.tiny_moe import groups, noise

    from dsplugins.plugins.backend.torch_local import TorchLocal

    count = config.num_moe_experts // config.expert_model_parallel_size
    built = plugin.ds_experts(config, TorchLocal().ds_backend(config))(count, config, pg_collection=groups())
    inner = config.moe_ffn_hidden_size
    rank, size = groups().expt_tp.rank(), groups().expt_tp.size()
    for i in range(count):
        w1, w2 = noise(2 * inner, H, seed=100 + first + i) * 0.2, noise(H, inner, seed=200 + first + i) * 0.2
        if hasattr(built, "weight1"):
            built.weight1.data[i], built.weight2.data[i] = w1, w2
        else:
            mlp = built.local_experts[i]
            gate, up = w1.chunk(2)
            mlp.linear_fc1.weight.data.copy_(torch.cat([gate.chunk(size)[rank], up.chunk(size)[rank]]))
            mlp.linear_fc2.weight.data.copy_(w2.chunk(size, dim=1)[rank])
    return built


def through(dispatcher: str, experts: str, expert: int, case: str, expert_tensor: int = 1) -> dict:
    """Output [2T, H] and all gradients, put together from both ranks."""
    from oracles.tiny_moe import groups, moe_config, noise

    from dsplugins.testing import model_parallel

    sizes = {"expert_model_parallel_size": expert, "expert_tensor_parallel_size": expert_tensor}
    with model_parallel(expert=expert, expert_tensor=expert_tensor, tensor=expert_tensor):
        config = moe_config(
            **sizes, tensor_model_parallel_size=expert_tensor, moe_token_dispatcher_type=dispatcher
        )
        rank = torch.distributed.get_rank()
        count = E // expert
        first = groups().ep.rank() * count
        built = experts_of(EXPERTS[experts], config, first)
        factory = DISPATCHERS[dispatcher].ds_dispatcher(config)
        carrier = factory(count, list(range(first, first + count)), config=config, pg_collection=groups())
        tokens, probs, routing_map = (part.chunk(2)[rank] for part in routed(case))
        tokens, probs = tokens.clone().requires_grad_(), probs.clone().requires_grad_()
        sent, scale = carrier.dispatch_preprocess(tokens, routing_map, probs)
        sent, scale = carrier.token_dispatch(sent, scale)
        sent, counts, scale = carrier.dispatch_postprocess(sent, scale)
        output, _ = built(sent, counts, scale)
        output = carrier.combine_postprocess(carrier.token_combine(carrier.combine_preprocess(output)))
        (output * noise(2 * T, 1, H, seed=5).chunk(2)[rank]).sum().backward()
        weights = [p.grad for p in built.parameters()]
    return {"output": output.detach(), "tokens": tokens.grad, "probs": probs.grad, "weights": weights}


def whole(ranks: list[dict]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([rank[name] for rank in ranks]) for name in ("output", "tokens", "probs")}


def expected(case: str) -> dict[str, torch.Tensor]:
    """The sum over chosen experts, expert by expert, without any dispatcher."""
    from oracles.tiny_moe import noise

    tokens, probs, routing_map = routed(case)
    tokens, probs = tokens.requires_grad_(), probs.requires_grad_()
    output = torch.zeros(2 * T, 1, H)
    for e in range(E):
        w1, w2 = noise(64, H, seed=100 + e) * 0.2, noise(H, 32, seed=200 + e) * 0.2
        gate, up = (tokens @ w1.T).chunk(2, -1)
        output = output + (probs[:, e, None, None] * torch.nn.functional.silu(gate) * up) @ w2.T
    (output * noise(2 * T, 1, H, seed=5)).sum().backward()
    return {"output": output.detach(), "tokens": tokens.grad, "probs": probs.grad * routing_map}


CASES = ["spread", "all to the first rank"]


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
    found = [
        list(AllToAll().ds_check(SimpleNamespace(), SimpleNamespace(model=model)))
        for model in (SimpleNamespace(moe_shared_expert_overlap=x) for x in (False, True))
    ]
    assert found[0] == [] and found[1][0].key == "model.moe_shared_expert_overlap"
