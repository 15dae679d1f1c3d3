"""What an author of a plugin forgets is said before a run."""

from __future__ import annotations

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


def made(cls):
    problems = []
    entry_point = SimpleNamespace(load=lambda: cls, value="mine:Mine")
    return make(Offer("mine", "event", "mine", "0.1", entry_point), {}, problems), problems


FORGOTTEN = {
    Unmarked: ("ds_step_end isn't marked as a hook", "put @hookimpl"),
    Selfless: ("ds_step_end has no self before its arguments", "tell its author"),
    Misspelt: ("there is no hook ds_step_ends", "did you mean ds_step_end?"),
    Idle: ("fills no hook", "docs/reference/hooks.md"),
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
    from pathlib import Path

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


@pytest.mark.parametrize("returned", [3.0, {"x": object()}, [1]])
def test_what_a_step_can_not_hold_names_the_plugin(returned):
    from dsplugins.failures import HookFailure
    from dsplugins.train import add

    with pytest.raises(HookFailure, match="mine failed in ds_step_end: TypeError: metrics.jsonl takes"):
        add({}, "mine", returned)


def test_what_is_right_is_made():
    plugin, problems = made(Right)
    assert plugin is not None and not problems
