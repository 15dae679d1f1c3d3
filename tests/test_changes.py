"""A run goes on with the plugins that it was started with: another set is refused, and each plugin named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsplugins.cli.train import _complete, prepared
from dsplugins.contracts import RecipeError
from dsplugins.recipe import Recipe
from dsplugins.rundir import RunDirectory

TINY = str(Path(__file__).parent / "tiny.yaml")


def loaded(*overrides):
    recipe = Recipe.load(TINY, list(overrides))
    return recipe, prepared(recipe)[0]


@pytest.fixture
def run(tmp_path):
    """A run with the plugin `expert_load`, and without `curves`, that has taken a step."""
    directory = RunDirectory(tmp_path / "run")
    directory.start(*loaded("plugins.expert_load={}"))
    directory.log({"step": 1})
    return directory


def refused(run, *overrides, accept=False):
    """Messages about a start with these overrides; None where it isn't refused."""
    try:
        assert _complete(run, *loaded(*overrides), fresh=False, accept=accept) is False
    except RecipeError as error:
        assert all("--accept-changes" in problem.remedy for problem in error.problems)
        return [problem.message for problem in error.problems]
    return None


def test_the_same_set_goes_on(run):
    assert refused(run, "plugins.expert_load={}") is None


def test_one_that_is_dropped_is_named(run):
    (*_, said) = refused(run)
    assert "another plugins.expert_load (from): dsplugins " in said and said.endswith(" -> absent")


def test_one_that_is_added_is_named(run):
    (*_, said) = refused(run, "plugins.expert_load={}", "plugins.curves={}")
    assert "another plugins.curves (from): absent -> dsplugins " in said


@pytest.mark.parametrize(
    ("key", "other"), [("version", "0.0.7"), ("distribution", "elsewhere"), ("class", "x:Y")]
)
def test_another_package_is_named_with_both(run, key, other):
    """And nothing else is: not the plugins whose package is the same."""
    file = run.path / "plugins.lock.json"
    lock = json.loads(file.read_text())
    (row,) = [row for row in lock["plugins"] if row["name"] == "aux_free"]
    now, row[key] = row[key], other
    file.write_text(json.dumps(lock))
    same = ("plugins.expert_load={}",)
    (said,) = refused(run, *same)
    before, _, after = said.partition(" -> ")
    assert "another plugins.aux_free (from): " in before and other in before and now in after
    assert refused(run, *same, accept=True) is None
