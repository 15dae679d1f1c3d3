"""Given tokens through a dispatcher and experts on real ranks, and the plain sum that must come out."""

from __future__ import annotations

import torch
from oracles.tiny_moe import groups, moe_config, noise

from dsplugins.plugins.dispatcher.allgather import AllGather
from dsplugins.plugins.dispatcher.alltoall import AllToAll
from dsplugins.plugins.dispatcher.deepep import DeepEP, DeepEPOptions
from dsplugins.plugins.dispatcher.fp8_alltoall import Fp8AllToAll
from dsplugins.plugins.dispatcher.hybridep import HybridEP, HybridEPOptions
from dsplugins.plugins.dispatcher.nccl_ep import NcclEP, NcclEPOptions
from dsplugins.plugins.experts.grouped import Grouped
from dsplugins.plugins.experts.sequential import Sequential

T, H, E, K = 10, 64, 16, 4
CASES = ["spread", "all to the first rank"]
DISPATCHERS = {"alltoall": AllToAll(), "allgather": AllGather()}
ROUNDING = {"fp8_alltoall": Fp8AllToAll()}
"""What arrives is not what was sent: see test_fp8_alltoall."""
FLEX = {
    "deepep": DeepEP(DeepEPOptions()),
    "hybridep": HybridEP(HybridEPOptions()),
    "nccl_ep": NcclEP(NcclEPOptions(moe_expert_rank_capacity_factor=2.0)),
}
"""These need their libraries: see test_flex."""
EXPERTS = {"sequential": Sequential(), "grouped": Grouped()}


def routed(case: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens [2T, 1, H], probs and map [2T, E] of both ranks together."""
    scores = torch.sigmoid(noise(2 * T, E, seed=2))
    if case == "all to the first rank":
        scores[:, E // 2 :] = 0
    chosen = scores.topk(K, dim=1).indices
    routing_map = torch.zeros(2 * T, E, dtype=torch.bool).scatter(1, chosen, True)
    return noise(2 * T, 1, H, seed=1), scores * routing_map, routing_map


def experts_of(plugin, config, first: int):
    """This rank's experts, weights by global number."""
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


def through(
    dispatcher: str, experts: str, expert: int, case: str, expert_tensor: int = 1, size: float = 1.0
) -> dict:
    """Output [2T, H] and all gradients, put together from both ranks; that of the output is `size` times
    `expected`'s."""
    from dsplugins.testing import model_parallel

    sizes = {"expert_model_parallel_size": expert, "expert_tensor_parallel_size": expert_tensor}
    with model_parallel(expert=expert, expert_tensor=expert_tensor, tensor=expert_tensor):
        owner = (DISPATCHERS | ROUNDING | FLEX)[dispatcher]
        fields = {key.removeprefix("model."): value for key, value in owner.ds_settings(None).items()}
        config = moe_config(**sizes, tensor_model_parallel_size=expert_tensor, **fields)
        rank = torch.distributed.get_rank()
        count = E // expert
        first = groups().ep.rank() * count
        built = experts_of(EXPERTS[experts], config, first)
        factory = owner.ds_dispatcher(config)
        carrier = factory(count, list(range(first, first + count)), config=config, pg_collection=groups())
        tokens, probs, routing_map = (part.chunk(2)[rank] for part in routed(case))
        tokens, probs = tokens.clone().requires_grad_(), probs.clone().requires_grad_()
        sent, scale = carrier.dispatch_preprocess(tokens, routing_map, probs)
        sent, scale = carrier.token_dispatch(sent, scale)
        sent, counts, scale = carrier.dispatch_postprocess(sent, scale)
        output, _ = built(sent, counts, scale)
        output = carrier.combine_postprocess(carrier.token_combine(carrier.combine_preprocess(output)))
        (output * size * noise(2 * T, 1, H, seed=5).chunk(2)[rank]).sum().backward()
        weights = [p.grad for p in built.parameters()]
    return {"output": output.detach(), "tokens": tokens.grad, "probs": probs.grad, "weights": weights}


def whole(ranks: list[dict]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([rank[name] for rank in ranks]) for name in ("output", "tokens", "probs")}


def expected(case: str, sent=lambda x: x) -> dict[str, torch.Tensor]:
    """The sum over chosen experts, expert by expert, without any dispatcher; `sent` is what arrives of tokens
    and of gradients of outputs."""
    tokens, probs, routing_map = routed(case)
    tokens, probs = sent(tokens).requires_grad_(), probs.requires_grad_()
    output = torch.zeros(2 * T, 1, H)
    for e in range(E):
        w1, w2 = noise(64, H, seed=100 + e) * 0.2, noise(H, 32, seed=200 + e) * 0.2
        gate, up = (tokens @ w1.T).chunk(2, -1)
        output = output + (probs[:, e, None, None] * torch.nn.functional.silu(gate) * up) @ w2.T
    (output * sent(noise(2 * T, 1, H, seed=5))).sum().backward()
    return {"output": output.detach(), "tokens": tokens.grad, "probs": probs.grad * routing_map}
