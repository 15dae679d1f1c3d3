"""MTP is made from the recipe's own parts and weighs what it should; its numbers: oracles/test_hf.py."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from dsplugins.plugins.mtp.mtp import Mtp, MtpOptions


@pytest.fixture(autouse=True)
def fresh_log():
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    MTPLossLoggingHelper.tracker.clear()
    yield
    MTPLossLoggingHelper.tracker.clear()


def built(depth: int = 1, weight: float = 0.3, **changes) -> torch.nn.Module:
    from oracles.tiny import build_tiny, tiny_config

    from dsplugins.plugins.attention.mla import Mla
    from dsplugins.weights import initialise

    config = tiny_config(mtp_num_layers=depth, mtp_loss_scaling_factor=weight, **changes)
    model = build_tiny(config, Mla(), Mtp(MtpOptions(depth=depth)))
    initialise([model], seed=2, std=0.1)
    return model


def mtp_gradient(model: torch.nn.Module) -> torch.Tensor:
    from oracles.tiny import tokens

    ids, positions = tokens()
    loss = model(ids, positions, None, labels=ids.roll(-1, 1), loss_mask=torch.ones(ids.shape))
    loss.mean().backward()
    return model.mtp.layers[0].eh_proj.weight.grad


@pytest.mark.parametrize("depth", [1, 2])
def test_parts_are_the_decoders(single, depth):
    model = built(depth)
    assert len(model.mtp.layers) == depth
    last = model.decoder.layers[-1]
    for block in model.mtp.layers:
        layer = block.mtp_model_layer
        for part in ("self_attention", "self_attention.core_attention", "mlp", "mlp.router", "mlp.experts"):
            assert type(layer.get_submodule(part)) is type(last.get_submodule(part)), part
        norms = (block.enorm, block.hnorm, block.final_layernorm)
        assert {type(norm) for norm in norms} == {type(last.input_layernorm)}


def test_weight_scales_the_loss(single):
    """Twice the weight, twice the gradient of what only MTP uses."""
    once, twice = mtp_gradient(built(weight=0.3)), mtp_gradient(built(weight=0.6))
    assert torch.allclose(twice, 2 * once, rtol=1e-5, atol=1e-9)
    assert once.norm() > 0


def test_embedding_and_head_are_shared(single):
    names = [name for name, _ in built().mtp.named_parameters()]
    assert not [name for name in names if "word_embeddings" in name or "output_layer" in name]


def settings(layers: int):
    return SimpleNamespace(model=SimpleNamespace(num_layers=layers))


@pytest.mark.parametrize(
    ("depth", "layers", "sequence", "word"),
    [(3, 2, 16, "more than model.num_layers=2"), (1, 0, 16, "num_layers=0"), (4, 8, 4, "seq_length=4")],
)
def test_problems(depth, layers, sequence, word):
    plan = SimpleNamespace(data=SimpleNamespace(seq_length=sequence))
    (problem,) = Mtp(MtpOptions(depth=depth)).ds_check(plan, settings(layers))
    assert word in problem.message
    assert problem.key and problem.remedy


def test_no_problem_and_settings():
    plan = SimpleNamespace(data=SimpleNamespace(seq_length=16))
    mtp = Mtp(MtpOptions())
    assert list(mtp.ds_check(plan, settings(3))) == []
    written = mtp.ds_settings(plan)
    assert written["model.mtp_num_layers"] == 1
    assert written["model.mtp_loss_scaling_factor"] is mtp.options.weight
