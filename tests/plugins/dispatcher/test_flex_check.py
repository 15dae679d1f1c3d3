"""What the flex dispatchers need is said before anything starts, and told from files, without a GPU."""

from __future__ import annotations

import ast
import importlib.util
import inspect
from types import SimpleNamespace

import pytest
import torch
from runs import TINY

from dsplugins.contracts import EnvironmentUnfit, RecipeError
from dsplugins.plugins.dispatcher import hybridep, nccl_ep
from dsplugins.plugins.dispatcher.deepep import DeepEP, DeepEPOptions
from dsplugins.plugins.dispatcher.sources import parameters, source

MACHINE = ["plugins.cpu=null", "plugins.cuda={}", "plugins.fp32=null", "plugins.bf16={}", "run.world_size=2"]
BUDGET = "moe_expert_rank_capacity_factor"
OWNERS = {"deepep": "{}", "hybridep": "{}", "nccl_ep": f"{{{BUDGET}: 4}}"}


def problems(name, *overrides):
    """Of the tiny recipe on two GPUs with one of the dispatchers."""
    from dsplugins.plan import prepare
    from dsplugins.recipe import Recipe
    from dsplugins.settings import settle

    owner = ["plugins.alltoall=null", f"plugins.{name}={OWNERS[name]}", "parallel.expert=2"]
    recipe = Recipe.load(TINY, [*MACHINE, *owner, *overrides])
    plugins, plan = prepare(recipe)
    try:
        settle(plan, plugins, recipe)
    except RecipeError as refused:
        return refused.problems
    return ()


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """`installed(path, text)`: a file of a package that this process then finds."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(path, text=""):
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        (tmp_path / path.split("/")[0] / "__init__.py").touch()
        importlib.invalidate_caches()

    return write


@pytest.mark.parametrize("name", OWNERS)
def test_a_missing_library_is_the_machines_fault(single, name):
    """Not the recipe's: plain `check` passes, and says that this machine lacks something."""
    if any(map(importlib.util.find_spec, ("deep_ep", "transformer_engine"))):
        pytest.skip("one of the libraries is installed here")
    (problem,) = problems(name)
    assert problem.kind == "environment" and problem.key == f"plugins.{name}"
    assert "isn't installed here" in problem.message and "alltoall" in problem.remedy


def test_a_library_that_core_could_not_import_stops_the_run(single):
    with pytest.raises(EnvironmentUnfit, match="could not import"):
        DeepEP(DeepEPOptions()).ds_dispatcher(SimpleNamespace())


SIX = "parallel.expert=6 run.world_size=6 train.global_batch=12"
ANY = {
    "plugins.cuda=null plugins.cpu={}": "needs CUDA, but the platform is cpu",
    "parallel.expert=1": "parallel.expert x parallel.expert_tensor above 1",
    "plugins.bf16=null plugins.fp32={}": "sends BF16 only",
    "model.moe_shared_expert_overlap=true": "shared experts would be left out",
    "model.moe_router_dtype=fp64": "model.moe_router_dtype has two writers",
}
ONE = {
    "deepep": {
        f"{SIX} model.num_moe_experts=24 train.micro_batch=1 evaluate.sequences=6": "no configuration for it",
        "plugins.deepep.moe_flex_dispatcher_num_sms=21": "even number of SMs",
        "model.hidden_size=36": "not a multiple of 8",
        "model.moe_hybridep_num_blocks_permute=4": "means nothing to deepep",
    },
    "hybridep": {
        "model.moe_ncclep_static_shape=true": "means nothing to hybridep",
        f"model.{BUDGET}=2 model.use_transformer_engine_op_fuser=true": "would drop tokens",
    },
    "nccl_ep": {
        "model.moe_expert_capacity_factor=2": "means nothing to nccl_ep",
        "model.moe_ncclep_static_shape=true": "op fuser",
    },
}
CASES = [*(("deepep", *item) for item in ANY.items()), *((n, *i) for n, d in ONE.items() for i in d.items())]


@pytest.mark.parametrize(("name", "change", "said"), CASES)
def test_what_core_would_ignore_or_fail_on_later_is_refused(single, name, change, said):
    found = [problem for problem in problems(name, *change.split()) if problem.kind == "recipe"]
    assert any(said in problem.message and problem.remedy for problem in found), found


def test_the_budget_of_nccl_ep_has_no_default(single):
    with pytest.raises(RecipeError, match="moe_expert_rank_capacity_factor is missing"):
        problems("nccl_ep", "plugins.nccl_ep=null", "plugins.nccl_ep={}")


def test_another_version_of_a_library_is_told_from_its_source(single, installed):
    installed("deep_ep/hybrid_ep_buffer.py", "class HybridEpBuffer: pass")
    assert "doesn't know HybridEPBuffer" in problems("hybridep")[0].message
    taken = ", ".join(sorted(hybridep.CALLED))
    old = f"class HybridEPBuffer:\n    def dispatch_with_permute(self, *, {taken}): pass"
    installed("deep_ep/hybrid_ep_buffer.py", old)
    assert problems("hybridep") == ()
    fused = problems("hybridep", "plugins.hybridep.moe_permute_fusion_into_hybridep=true")
    assert "doesn't know fuse_permute_dispatch" in fused[0].message
    wanted = ", ".join(sorted(nccl_ep.CALLED))
    installed("transformer_engine/pytorch/ep.py", f"def ep_bootstrap({wanted}, num_topk): pass")
    assert "asks for num_topk, which megatron-core doesn't give" in problems("nccl_ep")[0].message
    installed("transformer_engine/pytorch/ep.py", f"def ep_bootstrap({wanted}, num_topk=1): pass")
    assert problems("nccl_ep") == ()


def test_an_older_gpu_is_refused_where_it_can_be_seen(single, installed, monkeypatch):
    installed("deep_ep/__init__.py")
    assert problems("deepep") == ()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, count in (((8, 0), 1), ((9, 0), 0), ((10, 0), 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda given=capability: given)
        found = list(DeepEP(DeepEPOptions())._devices())
        assert [problem.kind for problem in found] == ["environment"] * count


def test_check_here_asks_plugins_where_a_gpu_can_be_seen(installed, monkeypatch):
    """In a process of its own that redirects nothing; here with a GPU that is only said to be there."""
    from dsplugins.cli.here import _parts
    from dsplugins.plan import prepare
    from dsplugins.recipe import Recipe

    installed("deep_ep/__init__.py")
    owner = ["plugins.alltoall=null", "plugins.deepep={}", "parallel.expert=2"]
    recipe = Recipe.load(TINY, [*MACHINE, *owner])
    plugins, plan = prepare(recipe)
    assert list(_parts(recipe, plan, plugins)) == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    (problem,) = _parts(recipe, plan, plugins)
    assert problem.kind == "environment" and "compute capability 9.0, this one has 8.0" in problem.message


def keywords(text, method):
    """Names of the arguments that a module gives to all its calls of a method."""
    calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    of_it = [call for call in calls if getattr(call.func, "attr", None) == method]
    return {word.arg for call in of_it for word in call.keywords if word.arg}


def test_what_core_gives_the_libraries_is_what_is_looked_for():
    """Fails when megatron-core calls them otherwise: the lists of the plugins are its calls."""
    from megatron.core.transformer.moe import fused_a2a

    text = inspect.getsource(fused_a2a)
    assert keywords(text, "dispatch_with_permute") == hybridep.CALLED
    assert keywords(text, "ep_bootstrap") | {"ep_group"} == nccl_ep.CALLED
    assert hybridep.FUSED in text


def test_parameters_are_read_without_an_import(installed):
    installed("halflib/part.py", "raise SystemExit\nclass C:\n    def f(self, a, b=1, *, c, d=2): pass\n")
    found = parameters(source("halflib", "part.py"), "C.f")
    assert found.required == {"a", "c"} and found.all == {"a", "b", "c", "d"}
    assert parameters(source("halflib", "part.py"), "C.g") is None
    assert source("halflib", "other.py") is None and source("no_such_library", "part.py") is None
