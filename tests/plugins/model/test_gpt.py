"""The model plugin: what it builds and what it refuses."""

from __future__ import annotations

import logging
from types import SimpleNamespace

from dsplugins.plugins.model.gpt import Gpt, GptOptions


def plan(tensor: int = 1, **model):
    return SimpleNamespace(model=model, layout=SimpleNamespace(tensor=tensor))


def problems(dense: int, layers: int = 3, experts: int | None = 8, tensor: int = 1, **more) -> list[str]:
    model = dict(num_layers=layers, num_moe_experts=experts, add_bias_linear=False) | more
    model = SimpleNamespace(**{"moe_shared_expert_intermediate_size": None} | model)
    settings = SimpleNamespace(model=model, vocab_size=160)
    return [p.key for p in Gpt(GptOptions(dense_layers=dense)).ds_check(plan(tensor), settings)]


def test_first_layers_are_dense():
    gpt = Gpt(GptOptions(dense_layers=3))
    written = gpt.ds_settings(plan(num_layers=5, num_moe_experts=8))
    assert written == {"model.moe_layer_freq": [0, 0, 0, 1, 1]}
    assert gpt.ds_settings(plan(num_layers=5)) == {}


def test_problems():
    assert problems(1) == []
    assert problems(0, experts=None) == []
    assert problems(3) == ["plugins.gpt.dense_layers"]
    assert problems(1, experts=None) == ["plugins.gpt.dense_layers"]
    assert problems(1, tensor=3) == ["model.vocab_size"]
    assert problems(1, add_bias_linear=True) == []
    biased = problems(1, add_bias_linear=True, moe_shared_expert_intermediate_size=64)
    assert biased == ["model.add_bias_linear"]


def test_builds_quietly_with_an_untied_head(single, caplog):
    from oracles.tiny import build_tiny, tiny_config, tokens

    from dsplugins.plugins.attention.mla import Mla

    with caplog.at_level(logging.WARNING):
        model = build_tiny(tiny_config(), Mla())
    assert "DEPRECATED" not in caplog.text
    assert model.output_layer.weight is not model.embedding.word_embeddings.weight
    assert not hasattr(model, "rotary_pos_emb")  # latent attention makes its own
    ids, positions = tokens()
    assert model(ids, positions, None, labels=ids).shape == ids.shape


def test_only_that_one_warning_is_held_back(caplog):
    from dsplugins.plugins.model.gpt import _without_deprecation_warning

    logger = logging.getLogger("megatron.core.models.gpt.gpt_model")
    with caplog.at_level(logging.WARNING), _without_deprecation_warning():
        logger.warning("GPTModel IS DEPRECATED. Please move")
        logger.warning("something else")
    logger.warning("GPTModel IS DEPRECATED. After the build")
    assert caplog.messages == ["something else", "GPTModel IS DEPRECATED. After the build"]
