"""TransformerEngine's recipes: what they write, what they need, what is said where it isn't there."""

from __future__ import annotations

import importlib.metadata
from types import SimpleNamespace

import pytest
import torch
from runs import SEQUENTIAL

from dsplugins.contracts import Layout
from dsplugins.plugins.precision.te_blockwise import TeBlockwise, TeBlockwiseOptions
from dsplugins.plugins.precision.te_mxfp8 import TeMxfp8

RECIPE = "deepseek_v3/tiny_gpu.yaml"
TE = ["plugins.torch_local=null", "plugins.te={}", "plugins.bf16=null"]
BLOCKWISE, MXFP8 = TeBlockwise(TeBlockwiseOptions()), TeMxfp8()
FP32_SCALES = TeBlockwise(TeBlockwiseOptions(scales="fp32"))


def problems(*overrides):
    """What `check` says of the recipe, without a GPU or TransformerEngine."""
    from pathlib import Path

    from dsplugins.cli import child

    recipe = str(Path(__file__).parents[3] / "recipes" / RECIPE)
    request = {"recipe": recipe, "overrides": [*TE, *overrides]}
    answer = child.start("dsplugins.meta", request, without_gpu=True).answer()
    return answer["built"], [(one["kind"], one["message"]) for one in answer["problems"]]


def test_check_builds_a_recipe_without_te_and_names_what_is_missing():
    """Core refuses `fp8` with experts where TE is missing: that is no fault of the recipe."""
    built, found = problems("plugins.te_blockwise={}", *SEQUENTIAL)
    assert built["stand_ins"] == {"te": "torch_local", "te_blockwise": "bf16"}
    assert {kind for kind, _ in found} == {"environment"}
    assert any("Only transformer-engine>=1.7.0 supports MoE FP8 training" in said for _, said in found)


def asked(plugin, tokens=64, **model):
    """What `ds_check` says of these sizes."""
    data, train = SimpleNamespace(seq_length=tokens), SimpleNamespace(micro_batch=1)
    plan = SimpleNamespace(slots={"attention": "mla"}, layout=Layout(), data=data, train=train)
    sizes = {
        "hidden_size": 64, "ffn_hidden_size": 64, "num_moe_experts": None, "sequence_parallel": False,
        "num_attention_heads": 4, "q_lora_rank": None, "kv_lora_rank": 64, "qk_head_dim": 32,
        "qk_pos_emb_head_dim": 32, "v_head_dim": 32,
    }  # fmt: skip
    settings = SimpleNamespace(model=SimpleNamespace(**sizes | model))
    return list(plugin.ds_check(plan=plan, settings=settings))


def test_sizes_are_refused_before_a_run():
    assert asked(BLOCKWISE) == asked(MXFP8) == []
    (tokens,), (rank,) = asked(MXFP8, tokens=48), asked(MXFP8, kv_lora_rank=48, qk_pos_emb_head_dim=16)[:1]
    assert "takes multiples of 32 tokens, but a rank's micro-batch has 48" in tokens.message
    assert "takes widths of multiples of 32, but model.kv_lora_rank is 48" in rank.message
    assert asked(BLOCKWISE, tokens=48, kv_lora_rank=48, qk_pos_emb_head_dim=16) == []
    assert {problem.kind for problem in (tokens, rank)} == {"recipe"}


@pytest.mark.parametrize(
    "overrides, said",
    [
        (["plugins.te_blockwise={}"], "plugins.te_blockwise: conflicts with grouped"),
        (["plugins.te_blockwise={}", "plugins.te=null", "plugins.torch_local={}", *SEQUENTIAL],
         "plugins.te_blockwise: requires te"),
        (["plugins.te_blockwise={}", "plugins.fp8_v3={}", *SEQUENTIAL], "precision"),
        (["plugins.te_mxfp8={}", "model.fp8=hybrid", *SEQUENTIAL], "model.fp8 has two writers"),
    ],
)  # fmt: skip
def test_what_does_not_go_together(overrides, said):
    from dsplugins.contracts import RecipeError
    from dsplugins.plan import prepare
    from dsplugins.recipe import Recipe
    from dsplugins.settings import ledger

    recipe = Recipe.load(RECIPE, [*TE, *overrides])
    with pytest.raises(RecipeError) as told:
        plugins, plan = prepare(recipe)
        raise RecipeError(ledger(plan, plugins, recipe).problems)
    assert any(said in problem.message for problem in told.value.problems)


def machine(plugin, version, capability, cuda, monkeypatch):
    """What is said of a machine with these."""

    def versions(name):
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", versions)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    found = asked(plugin)
    assert all(problem.kind == "environment" and problem.remedy for problem in found)
    return [problem.message for problem in found]


def test_machines_that_have_it(monkeypatch):
    assert machine(BLOCKWISE, "2.20.2+cu13", (9, 0), "13.0", monkeypatch) == []
    assert machine(BLOCKWISE, "2.3.0", (9, 0), "12.9", monkeypatch) == []
    assert machine(BLOCKWISE, "2.9.0", (10, 0), "12.9", monkeypatch) == []
    assert machine(MXFP8, "2.20.2", (10, 0), "13.0", monkeypatch) == []
    assert (
        machine(BLOCKWISE, None, (9, 0), "13.0", monkeypatch) == []
    )  # the backend te says that it is missing


NEEDS = {
    (
        BLOCKWISE,
        "2.2.1",
        (9, 0),
        "13.0",
    ): "needs TransformerEngine 2.3 or newer, installed is 2.2.1",
    (BLOCKWISE, "2.8.0", (10, 0), "13.0"): "needs TransformerEngine 2.9 or newer, installed is 2.8.0",
    (FP32_SCALES, "2.20.2", (10, 0), "13.0"): "has powers of two only on Blackwell (sm_100), but scales is",
    (BLOCKWISE, "2.20.2", (8, 0), "13.0"): "te_blockwise needs Hopper (sm_90) or newer, this GPU is sm_80",
    (BLOCKWISE, "2.20.2", (9, 0), "12.8"): "needs a torch for CUDA 12.9 or newer, this one is for 12.8",
    (MXFP8, "2.20.2", (9, 0), "13.0"): "te_mxfp8 needs Blackwell (sm_100): Hopper (sm_90) has no MXFP8",
    (MXFP8, "2.20.2", (8, 9), "13.0"): "te_mxfp8 needs Blackwell (sm_100), this GPU is sm_89",
    (MXFP8, "2.20.2", (12, 0), "13.0"): "te_mxfp8 needs Blackwell (sm_100), this GPU is sm_120",
}


@pytest.mark.parametrize("case, said", NEEDS.items())
def test_machines_that_do_not(case, said, monkeypatch):
    (message,) = machine(*case, monkeypatch)
    assert said in message


def test_scales_are_an_environment_variable_of_te():
    """Set in any case: a value that somebody left behind would be taken for the default."""
    name = "NVTE_FP8_BLOCK_SCALING_FP32_SCALES"
    assert BLOCKWISE.env == {name: "0"}
    assert TeBlockwise(TeBlockwiseOptions(scales="fp32")).env == {name: "1"}
