"""Recipes: extends, merge, overrides, places, and everything that is refused."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest

from dsplugins.contracts import Problem, RecipeError
from dsplugins.recipe import SECTIONS, Recipe, recipe_folder, render

BASE = """\
plugins:
  mla: {}
  aux_loss: {coefficient: 0.1}
  adamw: {}
model:
  num_layers: 4
  hidden_size: 64
train:
  global_batch: [{until: 2 steps, from: 1, to: 2}, {value: 2}]
"""
MINE = """\
extends: [base.yaml]
plugins:
  cpu: {}
  aux_loss: null
  aux_free: {rate: 1e-3}
model: {hidden_size: 128}
train:
  learning_rate: 2.2e-4
  steps: ${model.hidden_size}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with base.yaml and mine.yaml, and the process in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "mine.yaml").write_text(MINE)
    return tmp_path


def problems(text: str | bytes, *overrides: str) -> list[Problem]:
    """What is wrong with `bad.yaml` of this content."""
    Path("bad.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    return faults_of("bad.yaml", overrides)


def faults_of(path: str, overrides: Sequence[str]) -> list[Problem]:
    """What `load` raises, or what it leaves for later; never nothing."""
    try:
        found = Recipe.load(path, overrides).problems
    except RecipeError as error:
        found = error.problems
    assert found
    return list(found)


def only(text: str | bytes, *overrides: str) -> Problem:
    """The one thing that is wrong."""
    found = problems(text, *overrides)
    assert len(found) == 1, found
    return found[0]


def test_merge_over_what_is_extended(folder):
    recipe = Recipe.load("mine.yaml")
    assert recipe.name == "mine" and recipe.path == Path("mine.yaml")
    assert [path.name for path in recipe.sources] == ["base.yaml", "mine.yaml"]
    assert recipe.plugins == {"mla": {}, "adamw": {}, "cpu": {}, "aux_free": {"rate": 0.001}}
    assert list(recipe.plugins) == ["mla", "adamw", "cpu", "aux_free"]
    assert recipe.removed == ("aux_loss",)
    assert recipe.sections["model"] == {"num_layers": 4, "hidden_size": 128}
    assert recipe.sections["train"]["steps"] == 128
    assert type(recipe.sections["train"]["global_batch"]) is list
    assert type(recipe.sections["train"]["global_batch"][0]) is dict
    assert set(recipe.sections) == set(SECTIONS) and recipe.sections["ddp"] == {}


def test_places(folder):
    recipe = Recipe.load("mine.yaml", ["train.steps=3"])
    expected = {
        "model.num_layers": "base.yaml:6",
        "model.hidden_size": "mine.yaml:6",
        "plugins.aux_free.rate": "mine.yaml:5",
        "plugins.aux_free.never_given": "mine.yaml:5",
        "train.global_batch.0.until": "base.yaml:9",
        "train.steps": "command line",
        "train.learning_rate": "mine.yaml:8",
        "evaluate.every": "",
        "": "",
    }
    assert {key: recipe.place(key) for key in expected} == expected


def test_a_replaced_list_takes_its_places_along(folder):
    recipe = Recipe.load("mine.yaml", ["train.global_batch=4"])
    assert recipe.sections["train"]["global_batch"] == 4
    assert recipe.place("train.global_batch.0.until") == "command line"


def test_overrides_are_yaml(folder):
    given = ["plugins.aux_free=null", "plugins.aux_loss={}", "train.learning_rate=1e-4"]
    given += [
        "plugins.adamw.fused=true",
        "train.global_batch=[{until: 2B, from: 0, to: 1}]",
        "run.directory=x: y",
    ]
    found = problems(MINE, *given)
    assert [p.place for p in found] == ["command line"] and "run.directory" in found[0].message
    recipe = Recipe.load("mine.yaml", given[:-1])
    assert recipe.removed == ("aux_free",)
    # Named again after null: its old options are gone, its position is the old one.
    assert list(recipe.plugins.items())[1:3] == [("aux_loss", {}), ("adamw", {"fused": True})]
    assert recipe.sections["train"]["learning_rate"] == 1e-4
    assert recipe.sections["train"]["global_batch"] == [{"until": "2B", "from": 0, "to": 1}]
    assert recipe.overrides == tuple(given[:-1])


@pytest.mark.parametrize(
    ("written", "value"),
    [("1e-4", 1e-4), ("2.2e-4", 2.2e-4), ("1E5", 1e5), (".5", 0.5), ("14.8e12", 14.8e12), ("1.", 1.0)]
    + [("5", 5), ("-3", -3), ("1_000", 1000), ("true", True), ("469B", "469B"), ("2000 steps", "2000 steps")]
    + [("'1e-4'", "1e-4"), ("2020-01-01", "2020-01-01"), ("", None), ("e5", "e5"), ("-.inf", float("-inf"))],
)
def test_scalars(folder, written, value):
    (folder / "mine.yaml").write_text(f"data: {{}}\nmodel:\n  x: {written}\n")
    found = Recipe.load("mine.yaml", [f"data.x={written}"]).sections
    for read in (found["model"]["x"], found["data"]["x"]):
        assert read == value and type(read) is type(value)


def test_what_the_run_directory_keeps(folder):
    recipe = Recipe.load("mine.yaml", ["train.steps=3", "data.seq_length=8"])
    assert recipe.as_given().startswith(MINE.rstrip("\n"))
    assert recipe.as_given().endswith("# command line:\n#   train.steps=3\n#   data.seq_length=8\n")
    assert Recipe.load("mine.yaml").as_given() == MINE
    (folder / "again.yaml").write_text(recipe.resolved())
    again = Recipe.load("again.yaml")
    assert "extends" not in recipe.resolved() and "aux_loss" not in recipe.resolved()
    assert (again.plugins, again.sections) == (recipe.plugins, recipe.sections)
    assert list(again.plugins) == list(recipe.plugins)
    assert again.resolved() == recipe.resolved()


def test_resolved_texts_stay_texts(folder):
    (folder / "mine.yaml").write_text(
        "data: {a: '1e-4', b: 'x \\${y}', c: 'null', d: '12', e: \"two\\nlines\"}\n"
    )
    recipe = Recipe.load("mine.yaml")
    assert recipe.sections["data"] == {"a": "1e-4", "b": "x ${y}", "c": "null", "d": "12", "e": "two\nlines"}
    (folder / "again.yaml").write_text(recipe.resolved())
    assert Recipe.load("again.yaml").sections == recipe.sections


def test_environment_under_data_and_run_only(folder, monkeypatch):
    monkeypatch.setenv("CORPUS", "/corpus")
    monkeypatch.delenv("NOWHERE", raising=False)
    (folder / "mine.yaml").write_text("data: {path: '${oc.env:CORPUS}/x', other: '${oc.env:NOWHERE,d}'}\n")
    assert Recipe.load("mine.yaml").sections["data"] == {"path": "/corpus/x", "other": "d"}
    found = only("run: {directory: '${oc.env:NOWHERE}'}\n")
    assert "NOWHERE" in found.message and "oc.env:NAME,default" in found.remedy
    found = only("model:\n  x: '${oc.env:CORPUS}'\n")
    assert (found.key, found.place) == ("model.x", "bad.yaml:2") and "oc.env" in found.message
    assert only("train: {}\n", "train.seed=${oc.env:CORPUS}").place == "command line"


@pytest.mark.parametrize(
    "text",
    ["${oc.eval:1}", "${add:1}", "${ oc.decode : x}", "a${b:c}", "${${a.b}:c}", "${:x}", "${a.${f:1}}"]
    + ["${oc.env:A,${f:1}}", "${oc.env:A,'${f:1}'}", "\\\\${f:1}", "${oc.env:A,{a:1},${f:1}}"],
)
def test_no_resolver_is_ever_called(folder, text):
    from omegaconf import OmegaConf

    called = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 2.4 has a newer name, 2.3 has this one only
        for name in ("f", "add", "b"):
            OmegaConf.register_new_resolver(name, lambda *a: called.append(a), replace=True)
    try:
        for place in ("model", "data"):
            found = problems(f'{place}:\n  x: [{{y: "{text.replace(chr(92), chr(92) * 2)}"}}]\n')
            assert "resolver" in found[0].message and found[0].key == f"{place}.x.0.y"
    finally:
        for name in ("f", "add", "b"):
            OmegaConf.clear_resolver(name)
    assert called == []


def test_colons_outside_of_references_are_text(folder):
    text = "run: {directory: 'a:${model.n}:b', other: 'http://x', third: '\\${f:1}'}\nmodel: {n: 3}\n"
    (folder / "mine.yaml").write_text(text)
    expected = {"directory": "a:3:b", "other": "http://x", "third": "${f:1}"}
    assert Recipe.load("mine.yaml").sections["run"] == expected


REFUSED: list[tuple[str | bytes, str, int]] = [
    ("", "is empty", 1),
    ("# only this\n", "is empty", 1),
    ("- a\n", "is not a mapping", 1),
    ("just text\n", "is not a mapping", 1),
    ("model: {a: 1}\ntrain: [\n", "is not YAML", 3),
    ("model:\n\ta: 1\n", "is not YAML", 2),
    ("model: {}\n---\nmodel: {}\n", "is not YAML", 2),
    (b"\x00\x01\x02", "is not a text file", 1),
    ("model:\n  a: 1\n  b: 2\n  a: 3\n", "model.a is given twice, first at bad.yaml:2", 4),
    ("model: {}\ntrain: {}\nmodel: {}\n", "model is given twice", 3),
    (
        "train:\n  global_batch:\n    - {value: 1}\n    - {value: 1, value: 2}\n",
        "global_batch.1.value is given",
        4,
    ),
    ("model: {}\n\nmodle: {a: 1}\n", "modle is not a section", 3),
    ("plugins:\n  mla:\n    _target_: os.system\n", "can't name code", 3),
    ("data:\n  - _target_: os.system\n", "can't name code", 2),
    ("plugins:\n  os.system: {}\n", "can't hold a dot", 2),
    ("train.steps: 3\n", "can't hold a dot", 1),
    ("plugins:\n  MLA: {}\n", "is not a plugin's name", 2),
    ("plugins:\n  mla: true\n", "neither a mapping of options nor null", 2),
    ("plugins: [mla]\n", "plugins is not a mapping", 1),
    ("model: 3\n", "model is not a mapping", 1),
    ("model:\n  1: 2\n", "model.1 is not text", 2),
    ("model:\n  on: 2\n", "model.on is not text", 2),
    ("model:\n  [a]: 2\n", "is not text", 2),
    ("model:\n  a: !!python/object/apply:os.system [ls]\n", "recipes have no YAML tags", 2),
    ("model: &m {a: 1}\nddp: *m\n", "recipes have no YAML aliases", 2),
    ("model: &m\n  a: *m\n", "recipes have no YAML aliases", 2),
    ("extends: base.yaml\n", "extends is not a list", 1),
    ("extends:\n  - base.yaml\n  - 3\n", "not a file name", 3),
    ("extends:\n  - bass.yaml\n", "bass.yaml: there is no such file", 2),
    ("extends: [bad.yaml]\n", "goes in a circle: bad.yaml -> bad.yaml", 1),
    ("plugins:\n  aux_los: null\n", "removes a plugin that no file names", 2),
    (
        "extends: [base.yaml]\nmodel:\n  num_layers: ${model.nothing}\n",
        "model.num_layers: can't be resolved",
        3,
    ),
    ("model:\n  a: ${model.b}\n  b: 3\n  c: ${model.\n", "is not a reference", 4),
    ("model:\n  a: 3\n  b: ???\n", "model.b must be given", 3),
    ("extends: [base.yaml]\ntrain:\n  global_batch: {a: 1}\n", "a mapping can't be laid over a list", 3),
]


@pytest.mark.parametrize(("text", "words", "line"), REFUSED)
def test_refused_with_place(folder, text, words, line):
    found = [p for p in problems(text) if words in p.message]
    assert [p.place for p in found] == [f"bad.yaml:{line}"]
    assert all(p.remedy for p in found)


def test_not_utf_8(folder):
    assert "is not a text file" in only(b"\xff\xfe\xfa").message


@pytest.mark.parametrize(
    "override",
    ["train.steps", "=3", "train..steps=3", ".=1", "trian.steps=3", "train=null", "extends=[x]", "train=3"]
    + ["train.steps=[", "train.x=${f:1}", "train._target_=x", "plugins.mla=3", "plugins.aux_los=null"]
    + ["train.a=*x", "train.a=!!int 3", "train.a=1\nmodel: {}", "plugins.A={}", "train.global_batch.0.to=3"],
)
def test_refused_overrides(folder, override):
    found = faults_of("mine.yaml", [override])
    assert [p.place for p in found] == ["command line"] and found[0].remedy


def test_everything_at_once_across_files_and_command_line(folder):
    (folder / "base.yaml").write_text(BASE + "modle: {}\nddp: 3\n")
    found = problems("extends: [base.yaml, gone.yaml]\nplugins: {Bad: {}}\nrun: ${f:1}\n", "x=3", "train")
    text = "\n".join(f"{p.place} {p.message}" for p in found)
    for words in (
        "base.yaml:10 modle",
        "base.yaml:11 ddp",
        "bad.yaml:1 extends: gone",
        "bad.yaml:2 plugins.Bad",
    ):
        assert words in text
    for words in ("resolver f", "command line x is not a section", "'train' is not KEY=VALUE"):
        assert words in text


def test_unresolved_references_are_all_told(folder):
    found = problems("model: {a: '${model.x}', b: '${data.y}', c: [1, '${z}']}\ntrain: {}\n")
    assert [p.key for p in found] == ["model.a", "model.b", "model.c.1"]


def test_references_in_circles(folder):
    for text in (
        "model: {a: '${model.b}', b: '${model.a}'}\n",
        "model: {a: '${ddp}'}\nddp: {b: '${model}'}\n",
    ):
        assert problems(text)


def test_nearest_names(folder):
    assert only("modle: {}\n").remedy == "did you mean model?"
    assert only("extends: [bass.yaml]\n").remedy == "did you mean base.yaml?"
    assert only("extends: [base.yaml]\n", "plugins.aux_lss=null").remedy == "did you mean aux_loss?"
    with pytest.raises(RecipeError, match="recipe mien.yaml does not exist"):
        Recipe.load("mien.yaml")


def test_longer_circles_and_diamonds(folder):
    (folder / "a.yaml").write_text("extends: [b.yaml]\n")
    (folder / "b.yaml").write_text("extends: [a.yaml]\n")
    with pytest.raises(RecipeError, match="a.yaml -> b.yaml -> a.yaml"):
        Recipe.load("a.yaml")
    (folder / "left.yaml").write_text("extends: [base.yaml]\nmodel: {num_layers: 7}\n")
    (folder / "right.yaml").write_text("extends: [base.yaml]\nmodel: {x: 1}\n")
    (folder / "both.yaml").write_text("extends: [left.yaml, right.yaml]\n")
    both = Recipe.load("both.yaml")
    assert [path.stem for path in both.sources] == ["base", "left", "right", "both"]
    # base.yaml is laid once: what `left` changed is not undone on the way through `right`.
    assert both.sections["model"] == {"num_layers": 7, "hidden_size": 64, "x": 1}
    assert both.place("model.num_layers") == "left.yaml:2"


def test_extends_looks_beside_the_file_first(folder, monkeypatch):
    shipped = folder / "shipped"
    (shipped / "v3").mkdir(parents=True)
    (shipped / "base.yaml").write_text("model: {from_shipped: 1}\n")
    (shipped / "other.yaml").write_text("model: {other: 1}\n")
    (shipped / "v3" / "tiny.yaml").write_text("extends: [base.yaml]\n")
    monkeypatch.setattr("dsplugins.recipe_merge.recipe_folder", lambda: shipped)
    assert Recipe.load("v3/tiny.yaml").sections["model"] == {"from_shipped": 1}
    assert Recipe.load("v3/tiny.yaml").name == "tiny"
    (folder / "top.yaml").write_text("extends: [base.yaml, other.yaml]\n")
    found = Recipe.load("top.yaml").sections["model"]
    assert "num_layers" in found and "from_shipped" not in found and found["other"] == 1
    with pytest.raises(RecipeError) as caught:
        Recipe.load("v3/tiyn.yaml")
    assert caught.value.problems[0].remedy == "did you mean v3/tiny.yaml?"


def test_empty_headings_and_byte_order_mark(folder):
    (folder / "mine.yaml").write_bytes(b"\xef\xbb\xbfextends: [base.yaml]\nmodel:\nplugins:\n")
    recipe = Recipe.load("mine.yaml")
    assert recipe.sections["model"]["num_layers"] == 4 and "mla" in recipe.plugins


def test_a_folder_is_no_recipe(folder):
    (folder / "sub").mkdir()
    with pytest.raises(RecipeError, match="can't be read: Is a directory"):
        Recipe.load("sub")


def test_located_fills_places_and_keeps_those_given(folder):
    recipe = Recipe.load("mine.yaml")
    raw = [
        Problem("a", "model.num_layers"),
        Problem("b", "save.every"),
        Problem("c", "model", "", "plugin x"),
    ]
    assert [p.place for p in recipe.located(raw)] == ["base.yaml:6", "mine.yaml:1", "plugin x"]


def test_paths_are_shown_as_is_where_that_is_shorter(folder, monkeypatch):
    deep = folder.joinpath(*["d"] * len(str(folder)))  # "../" as often is longer than the folder's own path
    deep.mkdir(parents=True)
    monkeypatch.chdir(deep)
    assert Recipe.load(folder / "mine.yaml").place("train") == f"{folder}/mine.yaml:7"


def test_rendering():
    problem = Problem(
        "plugins.aux_free.rat is not an option", "k", "did you mean rate?", "recipes/mine.yaml:4"
    )
    other = Problem("no place", "k", "two\nlines")
    assert render([problem, other, problem]) == (
        "recipes/mine.yaml:4: plugins.aux_free.rat is not an option\n"
        "    did you mean rate?\nno place\n    two\n    lines\n"
        "2 problems. Nothing was started."
    )
    assert render([other]).endswith("\n1 problem. Nothing was started.")


def test_shipped_recipes_load():
    shipped = sorted(recipe_folder().rglob("*.yaml"))
    assert shipped
    for path in shipped:
        recipe = Recipe.load(str(path.relative_to(recipe_folder())))
        assert recipe.plugins or recipe.sections
