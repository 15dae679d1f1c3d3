"""The TransformerEngine backend says that TransformerEngine is missing, and never goes on without."""

import importlib.util
from types import SimpleNamespace

import pytest

from dsplugins.contracts import EnvironmentUnfit
from dsplugins.plugins.backend.te import TransformerEngine
from dsplugins.testing import prepare_cpu

PLAN = SimpleNamespace(slots={"platform": "cuda"})


def test_missing_te_is_an_environment_problem(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (problem,) = TransformerEngine().ds_check(plan=PLAN, settings=None)
    assert problem.kind == "environment"
    assert "TransformerEngine" in problem.message and "torch_local" in problem.remedy


def test_te_on_the_cpu_platform_is_a_recipe_problem(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    plan = SimpleNamespace(slots={"platform": "cpu"})
    (problem,) = TransformerEngine().ds_check(plan=plan, settings=None)
    assert problem.kind == "recipe"


def test_no_mock_backend_without_te():
    prepare_cpu()
    from megatron.core.extensions.transformer_engine import HAVE_TE

    if HAVE_TE:
        pytest.skip("TransformerEngine is installed here")
    with pytest.raises(EnvironmentUnfit, match="TransformerEngine"):
        TransformerEngine().ds_backend(config=None)


def test_stand_in_is_a_backend_that_exists():
    from importlib import metadata

    assert TransformerEngine.stand_in in metadata.entry_points(group="dsplugins.backend").names
