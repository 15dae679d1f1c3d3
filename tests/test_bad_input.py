"""Every fault of a recipe in one go, each with its place, key and remedy; nothing is started."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dsplugins.contracts import RecipeError
from dsplugins.plan import prepare
from dsplugins.recipe import Recipe, render

TINY = Path(__file__).parent / "tiny.yaml"


def problems_of(path, *overrides):
    with pytest.raises(RecipeError) as caught:
        prepare(Recipe.load(path, overrides))
    return caught.value.problems


def write(folder, text):
    file = folder / "mine.yaml"
    file.write_text(text)
    return file


def test_a_good_recipe_has_no_problems():
    plugins, plan = prepare(Recipe.load(TINY))
    assert plan.slots["router"] == "aux_free" and [item.name for item in plugins][0] == "gpt"


@pytest.mark.parametrize(
    ("override", "said", "remedy"),
    [
        ("traim.steps=3", "traim is not a section", "did you mean train"),
        ("train.stepz=3", "train.stepz is not an option", "did you mean steps"),
        ("train.steps=many", "train.steps='many' is not a whole number", ""),
        ("plugins.aux_fre={}", "no installed package offers", "did you mean aux_free"),
        (
            "plugins.aux_free.update_rat=1",
            "update_rat is not an option of aux_free",
            "did you mean update_rate",
        ),
        ("plugins.aux_free.update_rate=7", "out of range", ""),
        ("plugins.gqa={}", "slot attention is filled twice", "drop one"),
        ("plugins.mla=null", "slot attention is empty", "name one under plugins"),
        ("parallel.expert=3", "parallel.expert=3 does not divide model.num_moe_experts=8", ""),
        ("parallel.pipeline=2", "is not a multiple of tensor x pipeline", ""),
        ("train.global_batch=[{to: 3}]", "train.global_batch", ""),
        ("train.learning_rate=fast", "train.learning_rate", ""),
        ("run.directory=${oc.decode:x}", "resolver oc.decode is not allowed", ""),
        ("model.vocab_size=${oc.env:HOME}", "resolver oc.env is not allowed", ""),
        ("model._target_=os.system", "can't name code", ""),
        ("train.tokens=1000", "one of them", "drop one"),
    ],
)
def test_command_line_faults(override, said, remedy):
    problems = problems_of(TINY, override)
    hits = [p for p in problems if said in p.message]
    assert hits, [p.message for p in problems]
    assert remedy in hits[0].remedy
    assert all(p.place for p in problems)


def test_all_problems_at_once_with_lines(tmp_path):
    text = f"""extends: [{TINY}]
plugins:
  aux_fre: {{}}
  gqa: {{}}
parallel: {{expert: 3}}
traim: {{steps: 4}}
train:
  steps: no
"""
    file = write(tmp_path, text)
    shown = render(problems_of(file))
    for line, word in ((3, "aux_fre"), (4, "filled twice"), (6, "traim"), (8, "train.steps")):
        assert any(f"mine.yaml:{line}:" in row and word in row for row in shown.splitlines()), shown
    assert shown.endswith("problems. Nothing was started.")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"- a\n", "is not a mapping"),
        (b"a: [1\n", "is not YAML"),
        (b"\x00\xff\x01", "is not a text file"),
        (b"extends: [nowhere.yaml]\n", "there is no such file"),
        (b"extends: [mine.yaml]\n", "goes in a circle"),
        (b"train: {steps: 1}\ntrain: {steps: 2}\n", "is given twice"),
    ],
)
def test_broken_files(tmp_path, content, said):
    file = tmp_path / "mine.yaml"
    file.write_bytes(content)
    problems = problems_of(file)
    assert any(said in p.message for p in problems), [p.message for p in problems]
    assert all("mine.yaml:" in p.place for p in problems if said in p.message)


def test_exit_code_and_no_traceback(tmp_path):
    line = [
        sys.executable,
        "-m",
        "dsplugins",
        "train",
        str(TINY),
        "plugins.aux_fre={}",
        "run.directory=never",
    ]
    done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 3
    assert "Traceback" not in done.stderr and "did you mean aux_free" in done.stderr
    assert not (tmp_path / "never").exists()


def test_two_writers_are_both_named():
    from dsplugins.settings import ledger

    recipe = Recipe.load(TINY, ["model.moe_router_score_function=softmax"])
    plugins, plan = prepare(recipe)
    (problem,) = ledger(plan, plugins, recipe).problems
    assert (
        "command line sets 'softmax'" in problem.message
        and "plugin aux_free sets 'sigmoid'" in problem.message
    )
