"""Oracles O6 and O7: bias rule, sequence loss, and the routing of Hugging Face and megatron-core."""

from __future__ import annotations

import pytest
import torch


def config(**changes):
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    values = dict(
        num_layers=1,
        hidden_size=16,
        num_attention_heads=2,
        num_moe_experts=16,
        moe_router_topk=4,
        moe_router_num_groups=4,
        moe_router_group_topk=2,
        moe_router_topk_scaling_factor=2.5,
        moe_router_score_function="sigmoid",
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="seq_aux_loss",
        moe_aux_loss_coeff=1e-4,
        moe_router_bias_update_rate=0.001,
        add_bias_linear=False,
        use_cpu_initialization=True,
        init_method_std=0.5,
    )
    return MLATransformerConfig(**(values | changes))


def routers(**changes):
    """This project's and megatron-core's, with the same weights and a bias that matters."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.moe.router import TopKRouter

    from dsplugins.plugins.router.aux_free_router import AuxFreeRouter

    groups = ProcessGroupCollection.use_mpu_process_groups()
    ours = AuxFreeRouter(config(**changes), pg_collection=groups)
    stock = TopKRouter(config(moe_router_enable_expert_bias=True, **changes), pg_collection=groups)
    with torch.no_grad():
        ours.expert_bias.copy_(torch.linspace(-0.2, 0.2, 16)[torch.randperm(16)])
        stock.expert_bias.copy_(ours.expert_bias)
        stock.weight.copy_(ours.weight)
    return ours, stock


def test_equals_megatron_core_and_its_sequence_loss(single):
    torch.manual_seed(1)
    ours, stock = routers(moe_aux_loss_coeff=0.5)
    hidden = torch.randn(32, 3, 16)
    results = []
    for router in (ours, stock):
        router.set_layer_number(1)
        inputs = hidden.clone().requires_grad_()
        probs, routing_map = router(inputs)
        (probs * torch.arange(16)).sum().backward()
        results.append((probs, routing_map, router.weight.grad, inputs.grad))
    for mine, theirs in zip(*results, strict=True):
        # Sums of float32 in another order; the choice itself is compared bit for bit below.
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    assert torch.equal(results[0][1], results[1][1])


def test_equals_hugging_face_choice(single):
    transformers = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    from transformers import DeepseekV3Config

    torch.manual_seed(2)
    ours, _ = routers()
    theirs_config = DeepseekV3Config(
        hidden_size=16, n_routed_experts=16, num_experts_per_tok=4, n_group=4, topk_group=2,
        routed_scaling_factor=2.5, norm_topk_prob=True, moe_intermediate_size=8, intermediate_size=8,
        num_attention_heads=2, num_hidden_layers=1, vocab_size=16,
    )  # fmt: skip
    moe = transformers.DeepseekV3MoE(theirs_config)
    with torch.no_grad():
        moe.gate.weight.copy_(ours.weight)
        moe.gate.e_score_correction_bias.copy_(ours.expert_bias)
    hidden = torch.randn(64, 1, 16)
    probs, routing_map = ours(hidden)
    answer = moe.gate(hidden.view(-1, 16))
    indices, weights = (
        moe.route_tokens_to_experts(answer) if isinstance(answer, torch.Tensor) else answer[-2:]
    )
    if indices.is_floating_point():
        indices, weights = weights, indices
    dense = torch.zeros(64, 16).scatter(1, indices, weights.float())
    assert torch.equal(dense > 0, routing_map)
    torch.testing.assert_close(probs, dense, rtol=1e-6, atol=1e-6)


def test_bias_rule_is_exact(single):
    ours, _ = routers(moe_router_bias_update_rate=0.25)
    ours.expert_bias.zero_()
    counts = torch.tensor([4.0] * 14 + [2.0, 6.0])
    ours.update_bias(counts)
    assert ours.expert_bias.tolist() == [0.0] * 14 + [0.25, -0.25], "an exactly balanced expert does not move"


def test_bias_rule_balances_skewed_scores_and_freezes_at_zero(single):
    torch.manual_seed(3)
    ours, _ = routers(moe_router_num_groups=None, moe_router_group_topk=None)
    ours.expert_bias.zero_()
    scores = torch.sigmoid(torch.randn(512, 16) + torch.linspace(-1, 1, 16))

    def violation():
        counts = ours.choose(scores)[1].sum(0).float()
        return counts, float((counts.max() - counts.mean()) / counts.mean())

    first = violation()[1]
    for _ in range(1000):
        ours.update_bias(violation()[0])
    assert first > 1.0 and violation()[1] < 0.15
    ours.config.moe_router_bias_update_rate = 0.0
    before = ours.expert_bias.clone()
    ours.update_bias(violation()[0])
    assert torch.equal(before, ours.expert_bias)


def test_sequence_loss_of_a_balanced_sequence_is_alpha_and_ignores_the_bias(single):
    ours, _ = routers()
    # Each token prefers four experts of its own; sixteen tokens in four patterns use all experts equally.
    scores = torch.full((16, 1, 16), 0.1)
    for token in range(16):
        scores[token, 0, (token % 4) * 4 : (token % 4) * 4 + 4] = 0.9
    loss = ours.sequence_loss(scores, alpha=0.01)
    assert float(loss) == pytest.approx(0.01, rel=1e-5)
    ours.expert_bias.fill_(3.0)
    assert float(ours.sequence_loss(scores, alpha=0.01)) == float(loss)


def test_counts_once_and_only_while_training(single):
    ours, _ = routers()
    hidden = torch.randn(8, 2, 16)
    with torch.no_grad():
        ours(hidden)
    ours.eval()
    ours(hidden)
    assert float(ours.local_tokens_per_expert.sum()) == 0
    ours.train()
    torch.utils.checkpoint.checkpoint(
        lambda x: ours(x)[0], hidden.requires_grad_(), use_reentrant=True
    ).sum().backward()
    assert float(ours.local_tokens_per_expert.sum()) == 8 * 2 * 4


def test_buffers_stay_in_float32(single):
    ours, _ = routers()
    ours.bfloat16()
    assert ours.weight.dtype == torch.bfloat16
    assert ours.expert_bias.dtype == ours.local_tokens_per_expert.dtype == torch.float32
