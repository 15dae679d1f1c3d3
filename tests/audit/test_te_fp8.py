"""Megatron-core's FP8 by TransformerEngine: the audit sees the recipe, the autocast and who multiplies."""

from __future__ import annotations

import contextlib
import importlib.util
from types import SimpleNamespace

import pytest


class Float8BlockScaling:
    """Of this name is what core makes of `blockwise`."""


@pytest.fixture
def found(monkeypatch):
    """Differences of one layer with these modules, as if TransformerEngine were there."""
    from dsplugins.testing import prepare_cpu

    prepare_cpu()
    import torch
    from megatron.core import fp8_utils

    from dsplugins.audit import te_fp8

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: name == "transformer_engine" or find(name, *more)
    )

    def look(modules, experts=None, recipe=Float8BlockScaling, autocast=contextlib.ExitStack, **config):
        layer = torch.nn.Module()
        layer.layer_number, layer.mlp = 2, torch.nn.Module()
        for name, module in modules.items():
            layer.add_module(name, module)
        if experts is not None:
            layer.mlp.experts = experts
        monkeypatch.setattr(fp8_utils, "get_fp8_recipe", lambda config: recipe())
        monkeypatch.setattr(fp8_utils, "get_fp8_context", lambda config, layer: autocast())
        monkeypatch.setattr(te_fp8, "layers", lambda config, chunks: [("decoder.1", layer, True)])
        model = SimpleNamespace(
            **{"fp8": "e4m3", "fp8_recipe": "blockwise", "first_last_layers_bf16": False, "num_layers": 4}
            | config
        )
        run = SimpleNamespace(settings=SimpleNamespace(model=model), chunks=[])
        return list(te_fp8.differences(run))

    return look


def core_linear():
    import torch
    from megatron.core.tensor_parallel import ColumnParallelLinear

    linear = ColumnParallelLinear.__new__(ColumnParallelLinear)
    torch.nn.Module.__init__(linear)
    return linear


def test_nothing_to_say_where_all_multiply_by_te(found):
    import torch

    assert found({"linear_proj": torch.nn.Linear(2, 2)}) == []
    assert found({"linear_proj": core_linear()}, fp8=None) == []


def test_another_recipe(found):
    assert found({}, recipe=SimpleNamespace) == [
        ("model", "fp8_recipe blockwise is SimpleNamespace, chosen was Float8BlockScaling")
    ]


def test_no_autocast(found):
    ((place, said),) = found({}, autocast=contextlib.nullcontext)
    assert place == "decoder.1" and "no FP8 autocast" in said
    kept = {"first_last_layers_bf16": True, "num_layers_at_start_in_bf16": 2, "num_layers_at_end_in_bf16": 0}
    assert found({}, autocast=contextlib.nullcontext, **kept) == []


def test_linears_and_experts_that_core_multiplies(found):
    import torch

    packed = torch.nn.Module()
    packed.products = object()
    (_, first), (_, second) = found({"linear_proj": core_linear()}, experts=packed)
    assert first == "linear_proj is ColumnParallelLinear: megatron-core's fp8 does not reach it"
    assert "are packed" in second
