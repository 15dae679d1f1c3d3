"""Grouped experts against sequential ones: outputs, gradients, checkpoint keys."""

from __future__ import annotations

import pytest
import torch


def both(dtype):
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    from dsplugins.plugins.experts.grouped import Grouped
    from dsplugins.plugins.experts.sequential import Sequential

    config = MLATransformerConfig(
        num_layers=1, hidden_size=16, num_attention_heads=2, num_moe_experts=4, moe_ffn_hidden_size=8,
        ffn_hidden_size=32, gated_linear_unit=True, activation_func=torch.nn.functional.silu,
        add_bias_linear=False, use_cpu_initialization=True, params_dtype=dtype,
        bf16=dtype == torch.bfloat16, bias_activation_fusion=False,
    )  # fmt: skip
    groups = ProcessGroupCollection.use_mpu_process_groups()
    made = []
    for plugin in (Sequential(), Grouped()):
        factory = plugin.ds_experts(config=config, backend=LocalSpecProvider())
        made.append(factory(4, config, pg_collection=groups, name=None))
    sequential, grouped = made
    with torch.no_grad():
        for index, expert in enumerate(sequential.local_experts):
            grouped.weight1[index].copy_(expert.linear_fc1.weight)
            grouped.weight2[index].copy_(expert.linear_fc2.weight)
    return sequential, grouped


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [[5, 0, 7, 4], [16, 0, 0, 0]])
def test_bit_equal_forward_and_backward(single, dtype, counts):
    torch.manual_seed(0)
    sequential, grouped = both(dtype)
    tokens, probs = torch.randn(16, 16, dtype=dtype), torch.rand(16)
    results = []
    for experts in (sequential, grouped):
        inputs, weights = tokens.clone().requires_grad_(), probs.clone().requires_grad_()
        output, bias = experts(inputs, torch.tensor(counts), weights)
        assert bias is None
        output.float().pow(2).sum().backward()
        results.append((output, inputs.grad, weights.grad))
    for mine, theirs in zip(*results, strict=True):
        assert torch.equal(mine, theirs)
    for index, expert in enumerate(sequential.local_experts):
        if counts[index]:
            assert torch.equal(grouped.weight1.grad[index], expert.linear_fc1.weight.grad)
            assert torch.equal(grouped.weight2.grad[index], expert.linear_fc2.weight.grad)


def test_no_tokens_at_all_gives_zero_gradients(single):
    _, grouped = both(torch.float32)
    output, _ = grouped(torch.zeros(0, 16), torch.zeros(4, dtype=torch.int64), torch.zeros(0))
    output.sum().backward()
    assert float(grouped.weight1.grad.abs().sum()) == 0 == float(grouped.weight2.grad.abs().sum())


def test_checkpoint_keys_and_shapes_are_interchangeable(single):
    sequential, grouped = both(torch.float32)
    first, second = (experts.sharded_state_dict("mlp.experts.") for experts in (sequential, grouped))
    weights = {key: value for key, value in first.items() if not key.endswith("_extra_state")}
    assert set(weights) == set(second)
    for key, value in second.items():
        assert value.key == weights[key].key
        built = [x.build() if hasattr(x, "build") else [x] for x in (weights[key], value)]
        shapes = [[(t.key, t.global_shape, t.global_offset) for t in parts] for parts in built]
        assert shapes[0] == shapes[1]
