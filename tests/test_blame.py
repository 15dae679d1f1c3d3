"""Whoever wrote the code that failed is named, with the line, also where no hook was being called."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import forks
import pytest

TINY = Path(__file__).parent / "tiny.yaml"

PARTS = """
import torch
from megatron.core.transformer.moe.router import Router
from dsplugins.hookspecs import hookimpl

class InForward(Router):
    def __init__(self, config, pg_collection=None, is_mtp_layer=False):
        super().__init__(config=config, pg_collection=pg_collection, is_mtp_layer=is_mtp_layer)
        self.register_buffer("local_tokens_per_expert", torch.zeros(config.num_moe_experts), persistent=False)

    def routing(self, logits): ...

    def forward(self, input, padding_mask=None):
        return input.view(3, 5), None  # as many numbers as there never are

class InInit(InForward):
    def __init__(self, config, **kwargs):
        raise ValueError("not that many experts")

class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        raise ArithmeticError("no way back")

class Twice(torch.nn.Module):
    def forward(self, *args, **kwargs):
        return Double.apply(torch.ones(1, requires_grad=True))

class Narrow(torch.nn.Module):
    def __init__(self, config):
        super().__init__()

def failing():
    Twice()().sum().backward()
"""
OFFERED = """
from dsplugins.hookspecs import hookimpl

class Forward:
    @hookimpl
    def ds_router(self, plan, config):
        from parts_of_it import InForward
        return InForward

class Init:
    @hookimpl
    def ds_router(self, plan, config):
        from parts_of_it import InInit
        return InInit

class NoModule:
    @hookimpl
    def ds_router(self, plan, config):
        return lambda **kwargs: None

class NoFactory:
    @hookimpl
    def ds_router(self, plan, config):
        return 3

class NoSpec:
    @hookimpl
    def ds_attention(self, plan, config, backend):
        return 3

class ModuleNoFactory:
    @hookimpl
    def ds_experts(self, plan, config, backend):
        from parts_of_it import Twice
        return Twice()

class OtherArguments:
    @hookimpl
    def ds_experts(self, plan, config, backend):
        from parts_of_it import Narrow
        return Narrow

class NarrowAttention:
    @hookimpl
    def ds_attention(self, plan, config, backend):
        from megatron.core.transformer.spec_utils import ModuleSpec
        from parts_of_it import Narrow
        return ModuleSpec(module=Narrow)

class Listing:
    @hookimpl
    def ds_settings(self, plan):
        return ["model.bf16"]

class Saying:
    @hookimpl
    def ds_check(self, plan, settings):
        yield "too much"

class Fresh:
    @hookimpl
    def ds_precision(self, plan, config, backend):
        from dsplugins.plugins.backend.local_provider import TorchLocalProvider
        from megatron.core.tensor_parallel import ColumnParallelLinear

        class Mine(TorchLocalProvider):
            def column_parallel_linear(self):
                return type("Col", (ColumnParallelLinear,), {})

        return Mine()

class Meddling:
    @hookimpl
    def ds_model_built(self, chunks):
        from dsplugins.model import bare
        layer = bare(chunks[0]).decoder.layers[1].self_attention
        layer.__class__ = type("Other", (type(layer),), {})

class Wording:
    @hookimpl
    def ds_schedule(self, plan):
        return "gpipe"

class NoDispatcher:
    @hookimpl
    def ds_dispatcher(self, plan, config):
        return lambda *args, **kwargs: None
"""
ENTRY_POINTS = """
[dsplugins.router]
in_forward = offered_by_it:Forward
in_init = offered_by_it:Init
no_module = offered_by_it:NoModule
no_factory = offered_by_it:NoFactory
[dsplugins.experts]
a_module = offered_by_it:ModuleNoFactory
other_arguments = offered_by_it:OtherArguments
[dsplugins.schedule]
a_word = offered_by_it:Wording
[dsplugins.precision]
fresh = offered_by_it:Fresh
[dsplugins.event]
a_list = offered_by_it:Listing
a_text = offered_by_it:Saying
meddling = offered_by_it:Meddling
[dsplugins.attention]
no_spec = offered_by_it:NoSpec
narrow = offered_by_it:NarrowAttention
[dsplugins.dispatcher]
no_dispatcher = offered_by_it:NoDispatcher
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A distribution of two modules, neither of which has its name."""
    folder = tmp_path_factory.mktemp("site")
    information = folder / "somebodys-0.3.dist-info"
    information.mkdir()
    (folder / "parts_of_it.py").write_text(PARTS)
    (folder / "offered_by_it.py").write_text(OFFERED)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: somebodys\nVersion: 0.3\n")
    (information / "RECORD").write_text("parts_of_it.py,,\noffered_by_it.py,,\n")
    (information / "entry_points.txt").write_text(ENTRY_POINTS)
    return folder


def run(package, cwd, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(package)}
    return forks.run([sys.executable, "-m", "dsplugins", *map(str, arguments)], cwd=cwd, env=environment)


def line_of(package, name, text, after=0):
    lines = (package / name).read_text().splitlines()
    return f"{package / name}:{next(i for i, line in enumerate(lines, 1) if text in line) + after}"


def test_what_a_module_raises_in_a_step_is_one_line_and_in_the_status(package, tmp_path):
    swap = ["plugins.aux_free=null", "plugins.in_forward={}", "run.directory=out"]
    done = run(package, tmp_path, "train", TINY, *swap)
    said = "plugin in_forward failed in InForward.forward: RuntimeError: shape '[3, 5]' is invalid"
    at = line_of(package, "parts_of_it.py", "as many numbers")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert said in done.stderr and "(all calls: out/calls/rank-0.txt)" in done.stderr
    status = json.loads((tmp_path / "out" / "status.json").read_text())
    assert status["reason"].startswith(f"rank 0: {said}") and status["reason"].endswith(f" at {at}")
    calls = (tmp_path / "out" / "calls" / "rank-0.txt").read_text()
    assert calls.count("Traceback") == 2 and "moe_layer.py" in calls


CHECKED = {
    "in_init": ("InInit.__init__: ValueError: not that many experts", "parts_of_it.py", "raise ValueError"),
    "no_module": ("ds_router: its factory made NoneType, not a Module", None, None),
    "no_factory": (
        "ds_router: TypeError: gave int 3, not a factory: give its class, or a partial of it",
        "offered_by_it.py",
        "class NoFactory:",
    ),
    "no_spec": (
        "ds_attention: TypeError: gave int 3, not a ModuleSpec",
        "offered_by_it.py",
        "class NoSpec:",
    ),
    "a_module": (
        "ds_experts: TypeError: gave Twice Twice(), not a factory",
        "offered_by_it.py",
        "class ModuleNoFactory:",
    ),
    "other_arguments": (
        "ds_experts: its factory: Narrow.__init__() got an unexpected keyword argument 'pg_collection'",
        None,
        None,
    ),
    "narrow": (
        "ds_attention: TypeError: Narrow(): got an unexpected keyword argument 'layer_number'; it is made "
        "with config, layer_number, pg_collection, name",
        None,
        None,
    ),
    "fresh": (
        "ds_precision: TypeError: gave two classes Col, another each time that it was asked: make it once "
        "(functools.cache)",
        None,
        None,
    ),
    "a_list": (
        "ds_settings: TypeError: gave list ['model.bf16'], not a mapping of names to values",
        "offered_by_it.py",
        "class Listing:",
    ),
    "a_text": (
        "ds_check: TypeError: gave str 'too much', not a Problem",
        "offered_by_it.py",
        "class Saying:",
    ),
    "a_word": (
        "ds_schedule: TypeError: gave str 'gpipe', not a contracts.PipelineSchedule: it has no chunks",
        "offered_by_it.py",
        "class Wording:",
    ),
    "no_dispatcher": ("ds_dispatcher: its factory made NoneType, not a MoETokenDispatcher", None, None),
}
OWNERS = {
    "no_spec": "mla",
    "narrow": "mla",
    "fresh": "fp32",
    "no_dispatcher": "alltoall",
    "a_module": "grouped",
    "other_arguments": "grouped",
    "a_word": "one_f_one_b",
}
"""Whose place they take: else the router's."""
EVENTS = ("a_list", "a_text")


def swapped(name):
    owner = [] if name in EVENTS else [f"plugins.{OWNERS.get(name, 'aux_free')}=null"]
    return [*owner, f"plugins.{name}={{}}"]


@pytest.mark.parametrize("name", CHECKED)
def test_check_names_the_plugin_that_can_not_be_built(package, tmp_path, name):
    said, file, text = CHECKED[name]
    done = run(package, tmp_path, "check", TINY, *swapped(name))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"plugin {name} failed in {said}" in done.stderr
    if file:
        place = line_of(package, file, text, 1 if text.startswith("class ") else 0)
        assert f" at {place} (dsplugins --debug shows the calls)" in done.stderr


@pytest.mark.parametrize("name", ["a_list", "a_text", "a_word", "a_module", "fresh"])
def test_train_names_the_plugin_that_gives_something_else(package, tmp_path, name):
    """Before a process is started where that can be, else on the rank."""
    done = run(package, tmp_path, "train", TINY, *swapped(name), "run.directory=out")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"plugin {name} failed in {CHECKED[name][0]}" in done.stderr


def test_what_the_audit_refuses_is_one_message_of_all_ranks_and_their_code(package, tmp_path):
    done = run(
        package, tmp_path, "train", TINY, "plugins.meddling={}", "run.world_size=2", "run.directory=out"
    )
    said = "what is built is not what was chosen: decoder.1: attention is Other, chosen was "
    assert done.returncode == 3 and "Traceback" not in done.stderr
    assert done.stderr.count(said) == 1
    status = json.loads((tmp_path / "out" / "status.json").read_text())
    assert status["code"] == 3 and said in status["reason"]


def test_a_backward_pass_is_somebodys_too(package, monkeypatch):
    from types import SimpleNamespace

    from dsplugins import blame
    from dsplugins.failures import PluginFailure

    monkeypatch.syspath_prepend(str(package))
    import parts_of_it

    offer = SimpleNamespace(distribution="somebodys", entry_point=SimpleNamespace(module="offered_by_it"))
    plugins = [SimpleNamespace(name="twice", offer=offer, plugin=None)]
    said = "plugin twice failed in Double.backward: ArithmeticError: no way back"
    with pytest.raises(PluginFailure, match=said), blame.named(plugins):
        parts_of_it.failing()
    with pytest.raises(KeyError), blame.named(plugins):  # nobody's but ours
        {}["x"]


SEVERAL = """
def size(of):
    return 1 // of

class Noisy:
    def ds_check(self):
        return size(0)
    @staticmethod
    def alone():
        return 1 // 0

class Watch:
    def ds_check(self):
        return Noisy().ds_check()
"""


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda module, noisy, watch: noisy.ds_check(), "plugin noisy failed in size"),
        (lambda module, noisy, watch: module.Noisy.alone(), "plugin noisy failed in Noisy.alone"),
        (lambda module, noisy, watch: watch.ds_check(), "plugin watch failed in size"),
        (lambda module, noisy, watch: module.size(0), "plugin noisy or watch failed in size"),
    ],
)
def test_one_of_several_plugins_in_a_package_is_named_alone(tmp_path, monkeypatch, call, said):
    """By the object whose method is being called, or the class that has the function; else nobody knows."""
    import importlib
    from types import SimpleNamespace

    from dsplugins import blame

    (tmp_path / "several_in_one.py").write_text(SEVERAL)
    monkeypatch.syspath_prepend(str(tmp_path))
    module = importlib.import_module("several_in_one")
    plugins = []
    for cls in (module.Noisy, module.Watch):
        entry_point = SimpleNamespace(module="several_in_one", attr=cls.__name__)
        offer = SimpleNamespace(distribution="several", entry_point=entry_point)
        plugins.append(SimpleNamespace(name=cls.__name__.lower(), offer=offer, plugin=cls()))
    with pytest.raises(ZeroDivisionError) as raised:
        call(module, *(item.plugin for item in plugins))
    assert f"{said}: ZeroDivisionError" in str(blame.of_a_guest(raised.value, plugins))


def test_an_error_of_core_while_it_builds_names_the_parts_of_other_packages():
    from dataclasses import replace

    from dsplugins import blame
    from dsplugins.cli.exits import reason_of
    from dsplugins.plan import prepare
    from dsplugins.recipe import Recipe

    plugins, _ = prepare(Recipe.load(TINY, []))
    said = "'Linear' object has no attribute 'set_layer_number'"
    with pytest.raises(AttributeError) as alone, blame.built_with(plugins):
        raise AttributeError(said)
    assert plugins.guests() == [] and reason_of(alone.value).endswith("'set_layer_number'")
    router = plugins.owner("router")
    guest = replace(router, offer=replace(router.offer, distribution="mine", version="0.1"))
    plugins.chosen = tuple(guest if one is router else one for one in plugins.chosen)
    with pytest.raises(AttributeError) as named, blame.built_with(plugins):
        raise AttributeError(said)
    told = "(while the model was built, with parts by router aux_free (mine 0.1))"
    assert reason_of(named.value).endswith(told)
