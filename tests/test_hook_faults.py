"""What an author of a plugin forgets is said before a run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from dsplugins.hookspecs import hookimpl
from dsplugins.manager import make
from dsplugins.offers import Offer


class Unmarked:
    def ds_step_end(self, step):
        return {}


class Selfless:
    @hookimpl
    def ds_step_end(step):
        return {}


class Misspelt:
    @hookimpl
    def ds_step_ends(self, step):
        return {}


class Idle:
    pass


class Asking:
    def __init__(self, options):
        pass

    @hookimpl
    def ds_step_end(self, step):
        return {}


class Right:
    @hookimpl
    def ds_step_end(self, step):
        return {}


class FromTheFuture(Right):
    contract = ">=9"


class Unreadable(Right):
    contract = "the newest"


class First:
    @hookimpl(tryfirst=True)
    def ds_step_end(self, step):
        return {}


class Last:
    @hookimpl(trylast=True)
    def ds_step_end(self, step):
        return {}


class Around:
    @hookimpl(wrapper=True)
    def ds_step_end(self, step):
        return (yield)


class AroundAsOfOld:
    @hookimpl(hookwrapper=True)
    def ds_step_end(self, step):
        yield


class Elsewhere:
    @hookimpl
    def ds_router(self, plan, config):
        return None


class Curious:
    @hookimpl
    def ds_step_end(self, step, loss):
        return {}


class OddOptions(Right):
    Options = {"size": 3}


class NoOptions(Right):
    Options = None


def made(cls, slot="event"):
    problems = []
    entry_point = SimpleNamespace(load=lambda: cls, value="mine:Mine")
    return make(Offer("mine", slot, "mine", "0.1", entry_point), {}, problems), problems


FORGOTTEN = {
    Unmarked: ("ds_step_end isn't marked as a hook", "put @hookimpl"),
    Selfless: ("ds_step_end has no self before its arguments", "tell its author"),
    Misspelt: ("there is no hook ds_step_ends", "did you mean ds_step_end?"),
    Idle: ("fills no hook", "docs/reference/hooks.md"),
    FromTheFuture: ("needs the plugin contract >=9, this dsplugins has 1.", "install versions of both"),
    Unreadable: ("'the newest' is not a version specifier", "tell its author"),
    First: ("ds_step_end: the recipe orders plugins, not tryfirst/trylast", "drop tryfirst"),
    Last: ("ds_step_end: the recipe orders plugins, not tryfirst/trylast", "drop trylast"),
    Around: ("ds_step_end: a wrapper would be a second owner", "tell its author"),
    AroundAsOfOld: ("ds_step_end: a wrapper would be a second owner", "tell its author"),
    Elsewhere: ("fills ds_router, which is the hook of another slot", "tell its author"),
    Curious: ("ds_step_end asks for loss; it may ask for step", "tell its author"),
    OddOptions: ("its Options is not a dataclass", "tell its author"),
    Asking: ("could not be made: TypeError", "declare them, or take none"),
}


@pytest.mark.parametrize("cls", FORGOTTEN)
def test_what_is_forgotten_is_said(cls):
    plugin, (problem,) = made(cls)
    said, remedy = FORGOTTEN[cls]
    assert plugin is None and said in problem.message and remedy in problem.remedy
    assert problem.key == "plugins.mine"


class Writing:
    def __init__(self, wishes):
        self.wishes = wishes

    @hookimpl
    def ds_settings(self, plan):
        return self.wishes


@pytest.mark.parametrize(
    ("wishes", "said"),
    [
        (
            {"model.hiden_size": 3},
            "writes model.hiden_size, a field that megatron-core doesn't have; it has hidden_size",
        ),
        ({"train.steps": 3}, "writes train.steps, which is in none of model, optimizer, ddp"),
        (
            {"model.moe_z_loss_coeff": "much"},
            "moe_z_loss_coeff='much' is not a number or null; plugin mine writes it",
        ),
    ],
)
def test_a_field_that_a_plugin_writes_wrongly_names_the_plugin(wishes, said):
    from dsplugins.contracts import RecipeError
    from dsplugins.manager import Chosen, Plugins
    from dsplugins.plan import prepare
    from dsplugins.recipe import Recipe
    from dsplugins.settings import construct

    recipe = Recipe.load(Path(__file__).parent / "tiny.yaml")
    plugins, plan = prepare(recipe)
    mine = Chosen(Offer("mine", "event", "mine", "0.1", None), Writing(wishes), None)
    with pytest.raises(RecipeError) as refused:
        construct(plan, Plugins([*plugins, mine]), recipe)
    (problem,) = refused.value.problems
    assert said in problem.message and problem.key == "plugins.mine"


class Wrong:
    """Gives the same to whoever asks."""

    def __init__(self, answer):
        self.answer = answer


def wrong(hook, answer):
    """A plugin whose `hook` gives `answer`, alone in a run; its slot is the hook's."""
    from dsplugins.contracts import SLOTS
    from dsplugins.manager import Chosen, Plugins

    slot = hook.removeprefix("ds_")
    cls = type("Mine", (Wrong,), {hook: hookimpl(lambda self: self.answer)})
    offer = Offer("mine", slot if slot in SLOTS else "event", "mine", "0.1", None)
    plugins = Plugins([Chosen(offer, cls(answer), None)])
    return plugins.slot(slot) if slot in SLOTS else plugins.event(hook)


class HalfASchedule:
    chunks = 1

    def refuses(self, microbatches): ...


class Version:
    version = 1

    def save(self): ...

    def load(self, saved): ...


GIVEN = {
    "ds_settings": [
        (["model.bf16"], "not a mapping"),
        ({3: True}, "not a mapping"),
        ("model", "not a mapping"),
    ],
    "ds_check": [(["bad"], "gave str 'bad', not a Problem"), ("bad", "not a Problem"), (3, "not a Problem")],
    "ds_here": [(True, "gave bool True, not a Problem")],
    "ds_check_built": [({"a": 1}, "not a Problem")],
    "ds_platform": [
        ("cuda", "not a contracts.Platform: it has no device_type, distributed_backend, prepare")
    ],
    "ds_data": [
        ([1], "not a contracts.Data: it has no vocab_size, facts, train"),
        (Right, "gave the class Right"),
    ],
    "ds_backend": [("te", "not a BackendSpecProvider: it has no column_parallel_linear")],
    "ds_precision": [("fp8", "not a BackendSpecProvider"), (Right, "gave the class Right")],
    "ds_attention": [(Right, "not a ModuleSpec")],
    "ds_router": [(3, "not a factory")],
    "ds_experts": [([], "not a factory")],
    "ds_dispatcher": [("alltoall", "not a factory")],
    "ds_mtp": [(Right, "not a ModuleSpec")],
    "ds_model": [({}, "not a factory")],
    "ds_recompute": [(False, "gave bool False, not True"), (1, "not True")],
    "ds_schedule": [
        ("gpipe", "it has no chunks, forward_backward, finalize_grads, refuses"),
        (HalfASchedule(), "it has no forward_backward, finalize_grads"),
        (HalfASchedule, "gave the class HalfASchedule, not an object of it"),
    ],
    "ds_optimizer": [(3, "not a MegatronOptimizer: it has no step, zero_grad")],
    "ds_state": [({"pages": 3}, "not a contracts.PluginState: it has no version, save, load")],
    "ds_step_end": [([1], "not a mapping"), (3.0, "not a mapping")],
    "ds_run_end": [("runs/plot.png", "not a mapping")],
}


@pytest.mark.parametrize(("hook", "answer", "said"), [(h, *two) for h, all in GIVEN.items() for two in all])
def test_what_a_hook_can_not_give_names_the_plugin_and_what_it_gave(hook, answer, said):
    from dsplugins.failures import HookFailure

    with pytest.raises(HookFailure) as failure:
        wrong(hook, answer)
    assert f"plugin mine failed in {hook}: TypeError: gave " in str(failure.value)
    assert said in str(failure.value)
    assert failure.value.place.startswith(f"{__file__}:")


def test_every_hook_that_gives_something_is_looked_at():
    from dsplugins import given, hookspecs

    specs = {name: spec for name, spec in vars(hookspecs).items() if name.startswith("ds_")}
    giving = {name for name, spec in specs.items() if spec.__annotations__["return"] != "None"}
    assert given.WANTED.keys() == giving == GIVEN.keys()


def test_a_module_is_no_factory_though_it_can_be_called():
    import torch

    from dsplugins.failures import HookFailure

    with pytest.raises(HookFailure, match="not a factory: give its class, or a partial of it"):
        wrong("ds_experts", torch.nn.Linear(2, 2))
    assert wrong("ds_experts", torch.nn.Linear) is torch.nn.Linear


def test_what_a_hook_may_give_comes_through():
    from dsplugins.contracts import Problem

    problem, state = Problem("bad"), Version()
    assert wrong("ds_check", None) == [("mine", None)] and wrong("ds_check", []) == [("mine", [])]
    assert wrong("ds_check", iter([problem])) == [("mine", [problem])]
    assert wrong("ds_state", state) == [("mine", state)]
    assert wrong("ds_settings", {}) == [("mine", {})]


def test_an_error_between_two_problems_is_the_hooks():
    """A hook that yields runs while its answers are taken."""
    from dsplugins.contracts import Problem
    from dsplugins.failures import HookFailure

    def found():
        yield Problem("bad")
        raise ZeroDivisionError("a size of 0")

    with pytest.raises(
        HookFailure, match="mine failed in ds_check: ZeroDivisionError: a size of 0"
    ) as failure:
        wrong("ds_check", found())
    line = next(
        i
        for i, text in enumerate(Path(__file__).read_text().splitlines(), 1)
        if text.strip().startswith("raise ZeroDivision")
    )
    assert failure.value.place == f"{__file__}:{line}"


@pytest.mark.parametrize("returned", [3.0, {"x": object()}, [1]])
def test_what_a_step_can_not_hold_names_the_plugin(returned):
    from dsplugins.failures import HookFailure
    from dsplugins.train import add

    with pytest.raises(HookFailure, match="mine failed in ds_step_end: TypeError: metrics.jsonl takes"):
        add({}, "mine", returned)


@pytest.mark.parametrize("cls", [Right, NoOptions])
def test_what_is_right_is_made(cls):
    plugin, problems = made(cls)
    assert plugin is not None and not problems


def test_the_hook_of_its_slot_is_not_there():
    plugin, (problem,) = made(Right, "schedule")
    assert plugin is None and problem.message.endswith(
        "stands in group dsplugins.schedule but has no ds_schedule"
    )


@pytest.mark.parametrize(("cls", "said"), [(NoOptions, None), (OddOptions, "its Options is not a dataclass")])
def test_show_reads_options_or_says_why_not(cls, said):
    from dsplugins.cli.plugins import describe
    from dsplugins.contracts import EnvironmentUnfit

    offer = Offer("mine", "event", "mine", "0.1", SimpleNamespace(load=lambda: cls, value="mine:Mine"))
    if said is None:
        assert describe(offer)["options"] == []
        return
    with pytest.raises(EnvironmentUnfit, match=said):
        describe(offer)
