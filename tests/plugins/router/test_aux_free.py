"""V3's router against its equations, transformers' and megatron-core's (oracles O6, O7)."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from dsplugins.plugins.router.aux_free import AuxFree, AuxFreeOptions
from dsplugins.schedules import Schedule

PLUGIN = AuxFree(AuxFreeOptions())
S, B, H, E, K = 12, 3, 64, 16, 4


def build(seed: int = 3, **changes):
    from oracles.tiny_moe import moe_config, router

    return router(PLUGIN, moe_config(**changes), seed)


def hidden(length: int = S, batch: int = B, seed: int = 1) -> torch.Tensor:
    from oracles.tiny_moe import noise

    return noise(length, batch, H, seed=seed)


def biased(built, scale: float = 0.3, seed: int = 5):
    from oracles.tiny_moe import noise

    built.expert_bias.copy_(noise(E, seed=seed) * scale)
    return built


# -- routing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [(4, 2), (2, 1), (4, 4), (None, None)])
def test_the_equations(single, groups):
    """Eq. 12-16 and node-limited routing, token by token in float64."""
    built = biased(build(moe_router_num_groups=groups[0], moe_router_group_topk=groups[1]))
    x = hidden()
    probs, routing_map = built(x)
    assert probs.shape == routing_map.shape == (S * B, E) and routing_map.dtype == torch.bool
    scores = torch.sigmoid(x.double().view(-1, H) @ built.weight.double().T)
    for t, s in enumerate(scores.tolist()):
        choice = [a + b for a, b in zip(s, built.expert_bias.tolist(), strict=True)]
        chosen = chosen_experts(choice, *groups)
        total = sum(s[e] for e in chosen)
        assert set(routing_map[t].nonzero().flatten().tolist()) == set(chosen)
        for e in range(E):
            expected = 2.5 * s[e] / total if e in chosen else 0.0
            assert abs(probs[t, e].item() - expected) < 1e-6


def test_padding_is_refused(single):
    with pytest.raises(ValueError, match="padding_mask: batches here have no padding"):
        build()(hidden(), padding_mask=torch.zeros(B, S, dtype=torch.bool))


def chosen_experts(choice: list[float], groups: int | None, kept: int | None) -> list[int]:
    groups, kept = groups or 1, kept or 1
    size = E // groups
    members = [list(range(g * size, (g + 1) * size)) for g in range(groups)]
    best = sorted(members, key=lambda m: -sum(sorted((choice[e] for e in m), reverse=True)[: K // kept]))
    return sorted((e for m in best[:kept] for e in m), key=lambda e: -choice[e])[:K]


@pytest.mark.parametrize("shift", [0.0, -0.7, -2.0])
def test_equals_transformers(single, shift):
    """The same experts for every token, weights to 1e-6; also where affinity plus bias is below zero."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    settings = dict(n_group=4, topk_group=2, num_experts_per_tok=K, n_routed_experts=E, hidden_size=H)
    theirs = DeepseekV3TopkRouter(transformers.DeepseekV3Config(**settings, routed_scaling_factor=2.5))
    ours = biased(build())
    ours.expert_bias += shift
    theirs.weight.data.copy_(ours.weight)
    theirs.e_score_correction_bias.copy_(ours.expert_bias)
    x = hidden(64)
    probs, routing_map = ours(x)
    _, weights, indices = theirs(x)
    expected = torch.zeros_like(probs).scatter(1, indices, weights)
    assert torch.equal(routing_map, expected > 0)
    assert (probs - expected).abs().max() <= 1e-6
    ours.expert_bias.zero_()  # and the comparison can fail
    assert not torch.equal(ours(x)[1], expected > 0)


@pytest.mark.parametrize("dtype", [None, "fp32", "fp64"])
@pytest.mark.parametrize("half", [False, True])
def test_equals_core(single, dtype, half):
    """Bit for bit TopKRouter: probs, their type, the map, and gradients of gate and input."""
    from oracles.tiny_moe import core_router, moe_config, noise

    params = torch.bfloat16 if half else torch.float32
    shared = {"moe_router_dtype": dtype, "params_dtype": params, "bf16": half}
    ours = biased(build(**shared))
    theirs = core_router(moe_config(**shared, moe_router_enable_expert_bias=True), ours)
    results = []
    for built in (ours, theirs):
        x = hidden().to(params).requires_grad_()
        probs, routing_map = built(x)
        (probs * noise(S * B, E, seed=9)).sum().backward()
        results.append((probs, routing_map, built.weight.grad, x.grad))
    for mine, core in zip(*results, strict=True):
        assert mine.dtype == core.dtype
        assert torch.equal(mine, core)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gates_product_is_cores_to_the_bit(single, dtype, bias):
    """Forward and backward, from BF16, where core has no kernel of TransformerEngine."""
    from megatron.core.transformer.moe.moe_utils import router_gating_linear

    from dsplugins.plugins.router.logits import GateLogits

    found = []
    for product in (router_gating_linear, GateLogits.apply):
        generator = torch.Generator().manual_seed(0)
        shapes = [(5, 2, 16), (8, 16), *([(8,)] if bias else [])]
        given = [torch.randn(shape, generator=generator).bfloat16().requires_grad_() for shape in shapes]
        logits = product(given[0], given[1], given[2] if bias else None, dtype)
        logits.square().sum().backward()
        assert logits.dtype == dtype
        found.append([logits, *(tensor.grad for tensor in given)])
    assert all(torch.equal(theirs, ours) for theirs, ours in zip(*found, strict=True))


def test_weights_do_not_see_the_bias(single):
    """The same bias on all experts changes no choice, and so nothing at all."""
    built, x = build(), hidden()
    before = built(x)
    built.expert_bias.fill_(-3.0)  # below all affinities: groups are left out by -inf, not by 0
    after = built(x)
    assert torch.equal(before[1], after[1]) and torch.equal(before[0], after[0])


def test_half_precision_leaves_the_buffers(single):
    """bfloat16 would stop counting at 256 and lose a bias step of 0.001 beside 1."""
    built = biased(build())
    bias = built.expert_bias.clone()
    built.bfloat16()
    assert built.weight.dtype == torch.bfloat16
    for name in ("expert_bias", "local_tokens_per_expert", "aux_loss_sum"):
        assert getattr(built, name).dtype == torch.float32
    assert torch.equal(built.expert_bias, bias)


def test_state_keys_are_those_of_core(single):
    from oracles.tiny_moe import core_router, moe_config

    ours = build()
    theirs = core_router(moe_config(moe_router_enable_expert_bias=True), ours)
    assert ours.state_dict().keys() == theirs.state_dict().keys() == {"weight", "expert_bias"}
    mine, core = ours.sharded_state_dict("router."), theirs.sharded_state_dict("router.")
    assert mine.keys() == core.keys()
    for name in mine:
        assert (mine[name].key, mine[name].global_shape) == (core[name].key, core[name].global_shape)


# -- counts ---------------------------------------------------------------------------------------


def test_counts(single):
    built, x = build(), hidden()
    total = torch.zeros(E)
    for _ in range(2):
        probs, routing_map = built(x)
        probs.sum().backward()
        total += routing_map.sum(0)
    assert torch.equal(built.local_tokens_per_expert, total)
    assert total.sum() == 2 * S * B * K
    with torch.no_grad():
        built(x)
    built.eval()
    built(x)[0].sum().backward()
    assert torch.equal(built.local_tokens_per_expert, total)


@pytest.mark.parametrize("how", ["core", "torch reentrant", "torch"])
def test_recomputed_layers_count_once(single, how):
    """However the layer is run twice: without gradients first (core, torch's old way) or with them."""
    from functools import partial

    from megatron.core.tensor_parallel import checkpoint as core_checkpoint
    from torch.utils.checkpoint import checkpoint

    built, x = build(moe_aux_loss_coeff=1e-2), hidden().requires_grad_()
    probs, routing_map = built(x)
    probs.sum().backward()
    loss = built.aux_loss_sum.item()
    assert loss > 0
    built.local_tokens_per_expert.zero_()
    built.aux_loss_sum.zero_()
    run = {
        "core": lambda f: core_checkpoint(f, False, x),
        "torch reentrant": lambda f: checkpoint(f, x, use_reentrant=True),
        "torch": lambda f: checkpoint(f, x, use_reentrant=False),
    }[how]
    passes = []
    run(partial(watched, built, passes)).sum().backward()
    assert len(passes) == 2
    assert torch.equal(built.local_tokens_per_expert, routing_map.sum(0).float())
    assert built.aux_loss_sum.item() == loss


def watched(built, passes: list[int], x: torch.Tensor) -> torch.Tensor:
    passes.append(1)
    return torch.tanh(built(x)[0])  # something that needs its input saved, so that torch's runs again


def test_a_frozen_gate_is_counted(single):
    built = build()
    built.weight.requires_grad_(False)
    _, routing_map = built(hidden())
    assert torch.equal(built.local_tokens_per_expert, routing_map.sum(0).float())


# -- bias (O6) ------------------------------------------------------------------------------------


def test_bias_update_is_exact(single):
    """Algorithm 1 on random counts, as integers; experts exactly at the mean stay."""
    from megatron.core.transformer.moe.moe_utils import get_updated_expert_bias

    built = build(moe_router_bias_update_rate=0.001)
    generator = torch.Generator().manual_seed(0)
    signs, core = torch.zeros(E), torch.zeros(E)
    for _ in range(20):
        off = torch.randint(-3, 4, (E // 2 - 1,), generator=generator)
        counts = 100 + torch.cat([off, -off, torch.zeros(2, dtype=torch.int64)])
        expected = [(c < 100) - (c > 100) for c in counts.tolist()]
        assert counts.sum() == 100 * E and {-1, 0, 1} == set(expected)
        signs = signs + torch.tensor(expected)
        built.update_bias(counts.float())
        core = get_updated_expert_bias(counts.float(), core, 0.001)
        assert torch.equal(built.expert_bias, core)
    assert torch.allclose(built.expert_bias, 0.001 * signs, atol=1e-7)


def test_equal_counts_move_nothing(single):
    """An expert at the mean stays, also beyond 2^24, where a sum in float32 drops units."""
    built = build()
    for each in (0, 7, 1_966_080, 16_777_215):
        built.update_bias(torch.full((E,), float(each)))
    assert not built.expert_bias.any()
    generator = torch.Generator().manual_seed(0)
    rounded = 0
    for _ in range(20):
        off = torch.randint(1, 4_000_000, (E // 2 - 1,), generator=generator)
        counts = (12_000_003 + torch.cat([off, -off, torch.zeros(2, dtype=torch.int64)])).float()
        rounded += counts.mean().item() != 12_000_003
        built.update_bias(counts)
    assert rounded > 0  # float32's own mean would have moved the last two
    assert not built.expert_bias[-2:].any()
    assert built.expert_bias[:-2].abs().min() > 0.019


BALANCED = {"dp2": [], "ep2": ["parallel.expert=2"], "tp2": ["parallel.tensor=2"]}


def host_update(overrides: list[str]) -> dict[str, dict[str, list[float]]]:
    """One real step: what each router counted on this rank, what the cluster did, how its bias moved."""
    from runs import assembled

    from dsplugins import routers
    from dsplugins.step import Progress, take_step

    with assembled(overrides) as run:
        here, balance, own = dict(routers.local(run.chunks)), run.chain.balance, {}

        def look_first(move: bool) -> None:
            own.update({name: router.local_tokens_per_expert.tolist() for name, router in here.items()})
            balance(move)

        run.chain.balance = look_first
        step = take_step(run, Progress())
        total = dict(zip(step.router_layers, step.expert_counts.tolist(), strict=True))
        return {"own": own, "total": total, "bias": {n: r.expert_bias.tolist() for n, r in here.items()}}


@pytest.mark.parametrize("layout", BALANCED)
def test_counts_are_summed_before_the_sign(workers, layout):
    """By the host, over all ranks that share a router; decoder and MTP."""
    first, second = workers(2).run(host_update, BALANCED[layout])
    assert list(first["bias"]) == ["decoder.1", "decoder.2", "decoder.3", "mtp.0"]
    otherwise = 0
    for name, total in first["total"].items():
        assert [a + b for a, b in zip(first["own"][name], second["own"][name], strict=True)] == total
        moved = [0.001 * sign for sign in signs(total)]
        assert first["bias"][name] == second["bias"][name] == pytest.approx(moved, abs=1e-9)
        otherwise += sum(a != b for a, b in zip(signs(first["own"][name]), signs(total), strict=True))
    assert otherwise > 0, "one rank's own counts would have moved some biases elsewhere"


def signs(counts: list[float]) -> list[int]:
    mean = sum(counts) / len(counts)
    return [(count < mean) - (count > mean) for count in counts]


def closed_loop(*phases: tuple[float, int]) -> list[float]:
    """MaxVio of each step on fixed scores that favour a few experts; phases of (rate, steps)."""
    from oracles.tiny_moe import noise

    built = build()
    skew = torch.linspace(-0.5, 0.5, E)
    scores = torch.sigmoid(noise(2048, E, seed=2) * 0.5 + skew)
    history = []
    for rate, steps in phases:
        built.config.moe_router_bias_update_rate = rate
        for _ in range(steps):
            counts = built.choose(scores)[1].sum(0).float()
            history.append(float(counts.max() / counts.mean() - 1))
            built.update_bias(counts)
    return history


def test_closed_loop(single):
    """Falls into a small band at V3's rate, and stays exactly where it is once the rate is 0."""
    history = closed_loop((0.001, 300), (0.0, 20))
    assert history[0] > 1.0
    assert max(history[250:300]) < 0.1
    assert history[300] < history[100] < history[0]
    assert len(set(history[300:])) == 1
    assert len(set(closed_loop((0.0, 20)))) == 1


def test_a_fast_rate_swings(single):
    """[LF] section 4.2: 0.01 fluctuates late, 0.001 doesn't."""
    assert max(closed_loop((0.05, 300))[-50:]) > 2 * max(closed_loop((0.001, 300))[-50:])


# -- sequence loss (O7) ---------------------------------------------------------------------------


def loss_of(built, x: torch.Tensor) -> float:
    built.aux_loss_sum.zero_()
    built(x)[0].sum().backward()
    return built.aux_loss_sum.item()


def test_a_balanced_sequence_costs_alpha(single):
    """Each token prefers the next K experts, in turn: f = 1 and P = 1/E for all."""
    built = build(moe_aux_loss_coeff=1e-4)
    scores = torch.full((E, 2, E), 0.1)
    for t in range(E):
        for k in range(K):
            scores[t, :, (t + k) % E] = 0.9
    assert built.sequence_loss(scores, 1e-4).item() == pytest.approx(1e-4, rel=1e-5)
    scores[:, 1] = scores[0, 1]  # one sequence of the two is one-sided: f = E / K for the K experts
    share = 0.9 / (0.9 * K + 0.1 * (E - K))
    assert built.sequence_loss(scores, 1e-4).item() == pytest.approx(1e-4 * (1 + E * share) / 2, rel=1e-5)


def test_the_equations_of_the_loss(single):
    """Eq. 17-20 by loops in float64, mean over sequences."""
    built, x = build(moe_aux_loss_coeff=0.01), hidden()
    s = torch.sigmoid(x.double() @ built.weight.double().T)
    losses = []
    for b in range(B):
        frequency, share = torch.zeros(E).double(), torch.zeros(E).double()
        for t in range(S):
            frequency[s[t, b].topk(K).indices] += E / (K * S)
            share += s[t, b] / s[t, b].sum() / S
        losses.append(0.01 * (frequency * share).sum())
    assert loss_of(built, x) == pytest.approx(float(sum(losses).detach() / B), rel=1e-6)


def test_independent_of_bias_and_groups(single):
    from oracles.tiny_moe import balance_gradient

    x = hidden()
    plain, grouped = build(moe_aux_loss_coeff=0.1), biased(build(moe_aux_loss_coeff=0.1), scale=2.0)
    free = build(moe_aux_loss_coeff=0.1, moe_router_num_groups=None, moe_router_group_topk=None)
    assert not torch.equal(plain(x)[1], grouped(x)[1])
    assert loss_of(plain, x) == loss_of(grouped, x) == loss_of(free, x)
    assert torch.equal(balance_gradient(plain, x)[0], balance_gradient(grouped, x)[0])


@pytest.mark.parametrize("batch", [1, B])
@pytest.mark.parametrize("per_token", [False, True])
def test_the_loss_equals_core(single, batch, per_token):
    """Gradients too, with and without core's division of all gradients by the tokens."""
    from oracles.tiny_moe import balance_gradient, core_router, moe_config

    shared = {"moe_aux_loss_coeff": 0.1, "calculate_per_token_loss": per_token}
    ours = biased(build(**shared))
    config = moe_config(**shared, moe_router_load_balancing_type="seq_aux_loss")
    theirs = core_router(config, ours)
    x = hidden(batch=batch)
    mine, core = balance_gradient(ours, x), balance_gradient(theirs, x)
    assert core[0].abs().max() > 0
    for a, b in zip(mine, core, strict=True):
        assert (a - b).norm() < 1e-5 * b.norm()
    assert ours.aux_loss_sum.item() == pytest.approx(core_loss(theirs, x), rel=1e-6)


def core_loss(theirs, x: torch.Tensor) -> float:
    """What core's router attaches, without its scale for the per-token loss."""
    seen = []
    theirs.attach_and_log_load_balancing_loss = lambda probs, coeff, loss, *_, **__: (
        seen.append(loss) or probs
    )
    theirs(x)
    return seen[0].item()


def test_alpha_zero_attaches_nothing(single):
    from oracles.tiny_moe import balance_gradient

    built, x = build(moe_aux_loss_coeff=0.0), hidden()
    assert not balance_gradient(built, x)[0].any()
    assert loss_of(built, x) == 0


def parallel_loss(tensor: int, context: int) -> tuple[torch.Tensor, torch.Tensor, float, torch.Tensor]:
    """Balance gradients of gate (summed over ranks) and input (put together), loss, counts."""
    from megatron.core import parallel_state
    from oracles.tiny_moe import balance_gradient

    from dsplugins.testing import model_parallel

    parts = tensor * context
    with model_parallel(tensor=tensor, context=context):
        sizes = {"tensor_model_parallel_size": tensor, "context_parallel_size": context}
        built = build(moe_aux_loss_coeff=0.1, **sizes)
        assert built.weight.sequence_parallel is (tensor > 1)
        group = parallel_state.get_tensor_and_context_parallel_group()
        mine = hidden().chunk(parts)[group.rank()]
        gate, at_input = balance_gradient(built, mine)
        whole = [torch.empty_like(at_input) for _ in range(parts)]
        torch.distributed.all_gather(whole, at_input.contiguous(), group=group)
        sums = torch.cat([gate.flatten(), built.aux_loss_sum.view(1), built.local_tokens_per_expert])
        torch.distributed.all_reduce(sums, group=group)
    return sums[: E * H].view(E, H), torch.cat(whole), sums[E * H].item(), sums[E * H + 1 :]


@pytest.mark.parametrize(("tensor", "context"), [(2, 1), (1, 2)])
def test_sequences_split_over_ranks(workers, tensor, context):
    """TP with sequence parallel, and CP: loss, gradients and counts of one rank."""
    alone = workers(2).run(parallel_loss, 1, 1)[0]
    for split in workers(2).run(parallel_loss, tensor, context):
        for mine, expected in zip(split[:2], alone[:2], strict=True):
            assert (mine - expected).norm() < 1e-5 * expected.norm()
        assert split[2] == pytest.approx(alone[2], rel=1e-6)
        assert torch.equal(split[3], alone[3])


# -- the plugin -----------------------------------------------------------------------------------


def test_settings():
    rate = Schedule.constant(0.002)
    written = AuxFree(AuxFreeOptions(sequence_loss=2e-4, update_rate=rate)).ds_settings(SimpleNamespace())
    assert written["model.moe_aux_loss_coeff"] == 2e-4
    assert written["model.moe_router_bias_update_rate"] is rate
    assert written["model.moe_router_score_function"] == "sigmoid"


def problems(**changes) -> list[tuple[str, str]]:
    sizes = {
        "num_moe_experts": 16,
        "moe_router_topk": 4,
        "moe_router_num_groups": 4,
        "moe_router_group_topk": 2,
    }
    from dsplugins.plugins.router.sizes import UNSERVED

    config = SimpleNamespace(**(dict.fromkeys([*UNSERVED, "moe_router_pre_softmax"]) | sizes | changes))
    found = list(PLUGIN.ds_check(SimpleNamespace(), SimpleNamespace(model=config)))
    assert all(p.key in p.message and p.remedy for p in found)
    return [(p.key.removeprefix("model."), p.message) for p in found]


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        (
            {"moe_router_topk": 17, "moe_router_num_groups": None, "moe_router_group_topk": None},
            "moe_router_topk",
        ),
        ({"moe_router_num_groups": 3}, "moe_router_num_groups"),
        ({"moe_router_num_groups": 16}, "moe_router_num_groups"),
        ({"moe_router_num_groups": None}, "moe_router_num_groups"),
        ({"moe_router_group_topk": 5}, "moe_router_group_topk"),
        ({"moe_router_group_topk": 3}, "moe_router_group_topk"),
        ({"moe_router_num_groups": 8, "moe_router_group_topk": 1}, "moe_router_group_topk"),
        ({"moe_z_loss_coeff": 1e-3}, "moe_z_loss_coeff"),
        ({"moe_router_pre_softmax": True}, "moe_router_pre_softmax"),
        ({"moe_expert_capacity_factor": 1.0}, "moe_expert_capacity_factor"),
        ({"moe_router_force_load_balancing": True}, "moe_router_force_load_balancing"),
    ],
)
def test_problems(changes, key):
    assert [found for found, _ in problems(**changes)] == [key]


def test_no_problem():
    assert problems() == []
    assert (
        problems(num_moe_experts=256, moe_router_topk=8, moe_router_num_groups=8, moe_router_group_topk=4)
        == []
    )
    assert problems(num_moe_experts=None) == []
