"""megatron-core's words about a configuration, led back to the recipe's key."""

from __future__ import annotations

import pytest

from dsplugins.refusals import DERIVED_FROM, refusal
from dsplugins.settings import _derived

VALUES = {
    "num_layers": 61,
    "pipeline_model_parallel_size": 16,
    "moe_grouped_gemm": True,
    "cpu_offloading": True,
    "cpu_offloading_num_layers": 9,
}
WRITERS = {
    "model.num_layers": "v3.yaml:7",
    "model.pipeline_model_parallel_size": "derived",
    "model.moe_grouped_gemm": "plugin grouped",
    "model.cpu_offloading": "v3.yaml:9",
    "model.cpu_offloading_num_layers": "v3.yaml:10",
}


@pytest.mark.parametrize(
    ("said", "key"),
    [
        ("num_layers (61) must be divisible by\n pipeline_model_parallel_size", "model.num_layers"),
        ("pipeline_model_parallel_size must not be 16 with num_layers", "model.num_layers"),
        ("pipeline_model_parallel_size is odd", "parallel.pipeline"),
        ("moe_grouped_gemm needs pipeline_model_parallel_size 1", "parallel.pipeline"),
        ("moe_grouped_gemm is unsupported", "plugins.grouped"),
        ("cpu_offloading_num_layers is too large", "model.cpu_offloading_num_layers"),
        ("CPU offloading can't be done", "model.cpu_offloading"),
        ("that can't be", "model"),
    ],
)
def test_the_key_is_the_nearest_to_what_the_recipe_says(said, key):
    problem = refusal(said, "model", VALUES, WRITERS)
    assert problem.key == key
    assert " ".join(said.split()) in problem.message and problem.message.startswith(key)


def test_other_fields_named_are_in_the_remedy():
    problem = refusal("num_layers and moe_grouped_gemm", "model", VALUES, WRITERS)
    assert "plugins.grouped" in problem.remedy and "num_layers" not in problem.remedy


def test_every_field_of_the_layout_leads_to_a_key_of_parallel():
    from types import SimpleNamespace

    from dsplugins.contracts import Layout

    derived = _derived(SimpleNamespace(layout=Layout(virtual_pipeline=2)))
    assert set(derived) - {"model.moe_router_enable_expert_bias"} == set(DERIVED_FROM)


@pytest.mark.parametrize(
    "said",
    ["fused permutation is not available. Please install TE >= 2.1.0.", "Only transformer-engine>=1.7.0"],
)
def test_a_library_that_megatron_misses_is_no_fault_of_the_recipe(said, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    problem = refusal(said, "model", VALUES, WRITERS)
    assert problem.kind == "environment" and "dsplugins[te]" in problem.remedy
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert refusal(said, "model", VALUES, WRITERS).kind == "recipe"
