"""Latent attention against the equations, and its gradients across tensor-parallel ranks."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from oracles.latent import explicit, weights_of

from dsplugins.plugins.attention.mla import Mla

SEQUENCE, BATCH = 12, 2


def build(config, fixed: bool = True) -> torch.nn.Module:
    """One latent attention; `fixed=False` builds core's own, with the same spec."""
    from megatron.core.transformer.multi_latent_attention import MLASelfAttention
    from megatron.core.transformer.spec_utils import build_module

    from dsplugins.plugins.backend.torch_local import TorchLocal

    spec = Mla().ds_attention(config, TorchLocal().ds_backend(config))
    if not fixed:
        spec = replace(spec, module=MLASelfAttention)
    return build_module(spec, config=config, layer_number=1)


def hidden_states(config) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(SEQUENCE, BATCH, config.hidden_size, generator=generator)


@pytest.mark.parametrize("q_lora", [24, None])
def test_equals_the_equations(single, q_lora):
    from oracles.tiny import tiny_config

    config = tiny_config(q_lora_rank=q_lora)
    attention = build(config)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, float(parameter.ndim == 1), 0.1)
    hidden = hidden_states(config)
    output, bias = attention(hidden, None)
    (output**2).mean().backward()

    exact = {n: p.detach().double().requires_grad_() for n, p in weights_of(attention).items()}
    expected = explicit(exact, hidden.double(), config)
    (expected**2).mean().backward()
    assert bias is None
    assert (output - expected).abs().max() < 1e-5 * expected.std()
    for name, parameter in weights_of(attention).items():
        error = (parameter.grad - exact[name].grad).norm() / exact[name].grad.norm()
        assert error < 1e-5, name


def attention_gradients(fixed: bool, tensor: int, sequence_parallel: bool) -> dict[str, torch.Tensor]:
    """Gradients of one attention layer under global names, put together from all ranks."""
    from megatron.core import parallel_state
    from oracles.tiny import tiny_config

    from dsplugins.testing import model_parallel

    with model_parallel(tensor=tensor):
        config = tiny_config(tensor_model_parallel_size=tensor, sequence_parallel=sequence_parallel)
        attention = build(config, fixed)
        fill(attention)
        rank, group = (
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_tensor_model_parallel_group(),
        )
        hidden = hidden_states(config)
        mine = hidden.chunk(tensor)[rank] if sequence_parallel else hidden
        output, _ = attention(mine, None)
        target = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(4))
        aim = target.chunk(tensor)[rank] if sequence_parallel else target
        (output * aim).sum().backward()
        return {name: whole(name, p, group, sequence_parallel) for name, p in attention.named_parameters()}


def fill(attention: torch.nn.Module) -> None:
    from dsplugins.weights import fill as fill_shard
    from dsplugins.weights import shards

    for shard in shards(attention):
        fill_shard(shard, 11, 0.1)


def whole(name, parameter, group, sequence_parallel) -> torch.Tensor:
    """A parameter's gradient over all ranks: slices joined; a norm that saw half the tokens, summed."""
    import torch.distributed as dist

    gradient = parameter.grad.clone()
    if "norm" in name:
        if sequence_parallel and dist.get_world_size(group) > 1:
            assert parameter.sequence_parallel
            dist.all_reduce(gradient, group=group)
        return gradient
    parts = [torch.empty_like(gradient) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, gradient, group=group)
    return torch.cat(parts, dim=1 if "linear_proj" in name else 0)


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_gradients_on_two_ranks(workers, sequence_parallel):
    one = workers(2).run(attention_gradients, True, 1, False)[0]
    two = workers(2).run(attention_gradients, True, 2, sequence_parallel)[0]
    assert set(one) == set(two)
    for name, gradient in one.items():
        assert distance(two[name], gradient) < 1e-5, name


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_core_alone_loses_the_shared_keys_gradient(workers, sequence_parallel):
    """What the fix is for: when this fails, Megatron has mended it and `_qkv_down_projection` can go."""
    one = workers(2).run(attention_gradients, True, 1, False)[0]
    two = workers(2).run(attention_gradients, False, 2, sequence_parallel)[0]
    wrong = {name for name, gradient in one.items() if distance(two[name], gradient) > 1e-3}
    assert wrong == {"linear_kv_down_proj.weight"}
    rope = slice(32, 40)
    assert distance(two["linear_kv_down_proj.weight"][rope], one["linear_kv_down_proj.weight"][rope]) > 0.1


def distance(value: torch.Tensor, reference: torch.Tensor) -> float:
    return ((value - reference).norm() / reference.norm()).item()


def test_state_dict_keys_are_cores(single):
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from oracles.tiny import tiny_config

    stock = get_gpt_layer_local_spec(qk_layernorm=True, multi_latent_attention=True, normalization="RMSNorm")
    names = set(vars(stock.submodules.self_attention.submodules))
    config = tiny_config()
    built = {key.partition(".")[0] for key in build(config).state_dict()}
    assert built == {
        "linear_q_down_proj", "q_layernorm", "linear_q_up_proj", "linear_kv_down_proj", "kv_layernorm",
        "linear_kv_up_proj", "linear_proj",
    }  # fmt: skip
    assert built <= names


def test_a_subclass_may_be_a_down_projection(single):
    """Core raises ValueError for it; number formats come as subclasses."""
    from megatron.core.tensor_parallel import ColumnParallelLinear
    from megatron.core.transformer.spec_utils import build_module
    from oracles.tiny import tiny_config

    from dsplugins.plugins.backend.torch_local import TorchLocal

    class Mine(ColumnParallelLinear):
        pass

    config = tiny_config()
    spec = Mla().ds_attention(config, TorchLocal().ds_backend(config))
    slots = ("linear_q_down_proj", "linear_kv_down_proj", "linear_q_up_proj", "linear_kv_up_proj")
    spec = replace(spec, submodules=replace(spec.submodules, **dict.fromkeys(slots, Mine)))
    attention = build_module(spec, config=config, layer_number=1)
    assert {slot: type(getattr(attention, slot)) for slot in slots} == dict.fromkeys(slots, Mine)
    attention(hidden_states(config), None)[0].sum().backward()


def plan(**model):
    return SimpleNamespace(model=model, layout=SimpleNamespace(tensor=1))


def problems(model: dict, tensor: int = 1) -> list[str]:
    from oracles.tiny import tiny_config

    given = SimpleNamespace(model=model, layout=SimpleNamespace(tensor=tensor))
    settings = SimpleNamespace(model=tiny_config(**model))
    return [problem.message for problem in Mla().ds_check(given, settings)]


def test_plain_rope_never_scales_the_softmax():
    assert Mla().ds_settings(plan())["model.rope_type"] == "rope"
    for given in ({}, {"rope_type": "rope"}):
        assert Mla().ds_settings(plan(**given))["model.rotary_scaling_factor"] == 1.0
    assert "model.rotary_scaling_factor" not in Mla().ds_settings(plan(rope_type="yarn"))


def test_problems():
    assert problems({}) == []
    assert problems({"rope_type": "yarn", "rotary_scaling_factor": 40.0, "mscale_all_dim": 1.0}) == []
    assert "softmax" in problems({"rope_type": "rope", "rotary_scaling_factor": 40.0})[0]
    assert "mscale_all_dim" in problems({"rope_type": "yarn", "rotary_scaling_factor": 40.0})[0]
    assert "odd" in problems({"qk_pos_emb_head_dim": 7})[0]
    assert "mla_down_proj_fusion" in problems({"mla_down_proj_fusion": True})[0]
    assert [m.split()[0] for m in problems({}, tensor=3)] == ["parallel.tensor=3"] * 2
