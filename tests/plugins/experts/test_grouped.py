"""Grouped experts against core's sequential ones: every bit, marks, checkpoints, ranks without tokens."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from dsplugins.contracts import Layout
from dsplugins.plugins.experts.grouped import Grouped
from dsplugins.plugins.experts.sequential import Sequential

E, H = 16, 64
COUNTS = {
    "some empty": [5, 0, 7, 4, 1, 0, 0, 9, 2, 2, 2, 2, 8, 0, 3, 1],
    "one has all": [0] * 15 + [40],
    "many": [33, 65, 300, 1, 1, 1, 1, 31, 32, 64, 0, 257, 2, 1, 1, 96],
    "none": [0] * 16,
}


def build(plugin, config):
    from oracles.tiny_moe import groups

    from dsplugins.plugins.backend.torch_local import TorchLocal

    factory = plugin.ds_experts(config, TorchLocal().ds_backend(config))
    local = config.num_moe_experts // config.expert_model_parallel_size
    return factory(local, config, pg_collection=groups(), name="experts")


def cores(config):
    """Core's own module, of the same linears."""
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.experts import SequentialMLP
    from oracles.tiny_moe import groups

    from dsplugins.plugins.backend.torch_local import TorchLocal

    backend = TorchLocal().ds_backend(config)
    linears = MLPSubmodules(
        linear_fc1=backend.column_parallel_linear(),
        linear_fc2=backend.row_parallel_linear(),
        activation_func=backend.activation_func(),
    )
    return SequentialMLP(config.num_moe_experts, config, linears, pg_collection=groups())


def alike(config):
    """(core's own, `sequential`, `grouped`) with the same weights."""
    core, sequential, grouped = cores(config), build(Sequential(), config), build(Grouped(), config)
    sequential.load_state_dict(core.state_dict())
    with torch.no_grad():
        for i, expert in enumerate(core.local_experts):
            grouped.weight1[i].copy_(expert.linear_fc1.weight)
            grouped.weight2[i].copy_(expert.linear_fc2.weight)
    return core, sequential, grouped


def pair(config):
    """(sequential, grouped) with the same weights."""
    return alike(config)[1:]


def half(dtype: torch.dtype) -> dict[str, object]:
    return {"params_dtype": dtype, "bf16": dtype == torch.bfloat16, "init_method_std": 0.3}


def run(experts, tokens, counts, probs) -> list[torch.Tensor]:
    """Output, and gradients of tokens, probs and both weights [E, ...]."""
    from oracles.tiny_moe import noise

    tokens, probs = tokens.clone().requires_grad_(), probs.clone().requires_grad_()
    output, bias = experts(tokens, counts, probs)
    assert bias is None
    (output * noise(*output.shape, seed=7).to(output.dtype)).sum().backward()
    return [output, tokens.grad, probs.grad, *weight_gradients(experts)]


def weight_gradients(experts) -> list[torch.Tensor]:
    if hasattr(experts, "weight1"):
        return [experts.weight1.grad, experts.weight2.grad]
    linears = [(e.linear_fc1.weight.grad, e.linear_fc2.weight.grad) for e in experts.local_experts]
    return [torch.stack(grads) for grads in zip(*linears, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("case", COUNTS)
def test_every_bit_is_cores(single, dtype, fused, case):
    from oracles.tiny_moe import moe_config, noise

    built = alike(moe_config(**half(dtype), bias_activation_fusion=fused))
    counts = torch.tensor(COUNTS[case])
    tokens = noise(int(counts.sum()), H).to(dtype)
    probs = torch.sigmoid(noise(len(tokens), seed=4))  # float32, as with a gate in fp32
    cores, *ours = [run(experts, tokens, counts, probs) for experts in built]
    for found in ours:
        for mine, theirs in zip(found, cores, strict=True):
            assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
            assert torch.equal(mine, theirs)
    for gradient in ours[1][3:]:
        idle = counts == 0
        assert not gradient[idle].any() and gradient[~idle].flatten(1).any(1).all()


def test_probs_come_before_the_second_product(single):
    """Twice the probs, twice the output; and not on the input, which SwiGLU would square."""
    from oracles.tiny_moe import moe_config, noise

    _, grouped = pair(moe_config(**half(torch.float32)))
    counts = torch.tensor(COUNTS["some empty"])
    tokens, probs = noise(int(counts.sum()), H), torch.sigmoid(noise(int(counts.sum()), seed=4))
    once, twice = grouped(tokens, counts, probs)[0], grouped(tokens, counts, 2 * probs)[0]
    assert torch.equal(2 * once, twice) and once.abs().max() > 0


# -- marks and checkpoints ------------------------------------------------------------------------


def marks(tensor: int, expert: int, expert_tensor: int) -> list[list[tuple]]:
    """What core's gradient reduction and clipping read from each kind's parameters."""
    from oracles.tiny_moe import moe_config

    from dsplugins.testing import model_parallel

    with model_parallel(tensor=tensor, expert=expert, expert_tensor=expert_tensor):
        config = moe_config(
            tensor_model_parallel_size=tensor,
            expert_model_parallel_size=expert,
            expert_tensor_parallel_size=expert_tensor,
        )
        return [
            sorted({(p.allreduce, p.tensor_model_parallel) for p in build(plugin, config).parameters()})
            for plugin in (Sequential(), Grouped())
        ]


@pytest.mark.parametrize("layout", [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 1)])
def test_marks_are_those_of_core(workers, layout):
    """TP 2 with whole experts on each rank is the case that is easily missed."""
    for sequential, grouped in workers(2).run(marks, *layout):
        assert grouped == sequential
        assert grouped == [(layout == (1, 1, 1), True)]


def described(experts, metadata) -> dict[str, list[tuple]]:
    """Local key -> where each piece belongs in the whole."""
    found = {}
    for name, tensor in experts.sharded_state_dict("mlp.experts.", metadata=metadata).items():
        pieces = tensor.build() if hasattr(tensor, "build") else [tensor]
        if name.endswith(".weight"):
            found[name] = [
                (
                    p.key,
                    p.global_shape,
                    p.global_offset,
                    p.axis_fragmentations,
                    p.replica_id,
                    p.prepend_axis_num,
                )
                for p in pieces
            ]
    return found


def checkpoints(expert: int, metadata) -> list[dict[str, list[tuple]]]:
    from oracles.tiny_moe import moe_config

    from dsplugins.testing import model_parallel

    with model_parallel(expert=expert):
        config = moe_config(expert_model_parallel_size=expert)
        return [described(build(plugin, config), metadata) for plugin in (Sequential(), Grouped())]


@pytest.mark.parametrize("metadata", [None, {"singleton_local_shards": True}])
@pytest.mark.parametrize("expert", [1, 2])
def test_checkpoint_places_are_those_of_core(workers, expert, metadata):
    ranks = workers(2).run(checkpoints, expert, metadata)
    for sequential, grouped in ranks:
        assert len(grouped) == 2 * E // expert
        assert grouped == sequential
    assert (ranks[0][1] == ranks[1][1]) is False  # other experts, or another copy of the same


def test_checkpoint_tensors_are_the_weights_own_memory(single):
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
    from oracles.tiny_moe import moe_config

    grouped = build(Grouped(), moe_config())
    for tensor in grouped.sharded_state_dict("").values():
        for piece in tensor.build() if isinstance(tensor, ShardedTensorFactory) else [tensor]:
            piece.data.fill_(3.0)
    assert all((p == 3.0).all() for p in grouped.parameters())


# -- the plugin -----------------------------------------------------------------------------------


def problems(layout: Layout | None = None, **changes) -> list[str]:
    from oracles.tiny_moe import moe_config

    plan = SimpleNamespace(layout=layout or Layout())
    return [p.key for p in Grouped().ds_check(plan, SimpleNamespace(model=moe_config(**changes)))]


def test_problems():
    assert problems() == []
    assert problems(Layout(world_size=2, tensor=2, expert_tensor=2)) == ["parallel.expert_tensor"]
    assert problems(add_bias_linear=True) == ["plugins.grouped"]
    assert problems(activation_func_clamp_value=7.0) == ["model.activation_func_clamp_value"]
    assert problems(moe_ffn_hidden_size=30) == ["model.moe_ffn_hidden_size"]
    assert problems(params_dtype=torch.bfloat16, moe_ffn_hidden_size=36) == ["model.moe_ffn_hidden_size"]
    dense = SimpleNamespace(model=SimpleNamespace(num_moe_experts=None))
    assert Grouped().ds_check(SimpleNamespace(layout=Layout()), dense) == []
