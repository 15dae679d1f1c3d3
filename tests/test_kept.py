"""Files that a run left: what is read of damaged ones, and what is said."""

from __future__ import annotations

import json

import pytest

from dsplugins import changes, kept
from dsplugins.cli import exits
from dsplugins.contracts import RecipeError
from dsplugins.pictures.style import read_metrics as curves
from dsplugins.rundir import RunDirectory

WHOLE = '{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize(
    "tail", ["", '{"step": 3, "lo', '{"step": 3, "lo\n', '{"step": 3}', "\0\0\0\0", '"ä'.encode()[:-1]]
)
def test_a_last_line_counts_if_it_is_whole(tmp_path, tail):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(WHOLE.encode() + (tail if isinstance(tail, bytes) else tail.encode()))
    assert kept.rows(file) == [{"step": 1}, {"step": 2}]
    run = RunDirectory(tmp_path)
    assert run.steps() == 2
    run._rewind(1)
    assert file.read_text() == '{"step": 1}\n'


def test_no_file_is_no_rows(tmp_path):
    assert kept.rows(tmp_path / "metrics.jsonl") == []


@pytest.mark.parametrize("line", ['{"step": 3, "lo', "\0\0", "", "3", "\xff"])
def test_another_damaged_line_is_told(tmp_path, line):
    file = tmp_path / "evaluations.jsonl"
    file.write_text(f"{WHOLE}{line}\n{WHOLE}", encoding="latin-1")
    with pytest.raises(RecipeError) as raised:
        RunDirectory(tmp_path).evaluated()
    assert exits.code_of(raised.value) == 4
    assert exits.message_of(raised.value) == f"{file}: line 3 is damaged: mend that line, or remove it"


@pytest.mark.parametrize("row", ["{}", '{"step": "3"}', '{"step": null}'])
def test_a_row_that_tells_no_step_is_told(tmp_path, row):
    file = tmp_path / "metrics.jsonl"
    file.write_text(f"{WHOLE}{row}\n")
    for read in (
        RunDirectory(tmp_path).steps,
        lambda: RunDirectory(tmp_path)._rewind(1),
        lambda: curves(tmp_path),
    ):
        with pytest.raises(RecipeError, match="line 3 tells no step"):
            read()


@pytest.mark.parametrize("said", ["{}", '{"step": null}', '{"step": "x"}', "[]", "", None])
def test_what_does_not_tell_the_last_saved_step_tells_none(tmp_path, said):
    if said is not None:
        (tmp_path / "saved.json").write_text(said)
    assert RunDirectory(tmp_path).saved() is None


RESOLVED, LOCK = "a: 1\n", json.dumps({"versions": {"torch": "2"}, "plugins": []})


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("plugins.lock.json", "", "is empty"),
        ("plugins.lock.json", LOCK[:-5], "is not JSON: "),
        ("plugins.lock.json", "[]", "is not a JSON object"),
        ("plugins.lock.json", "{}", "is no lock of plugins and versions"),
        ("plugins.lock.json", '{"versions": {}, "plugins": [{"name": "x"}]}', "is no lock of plugins"),
        ("recipe.resolved.yaml", "", "is empty"),
        ("recipe.resolved.yaml", "a: [1,\n", "can't be read: "),
        ("recipe.resolved.yaml", "- 1\n", "holds no recipe"),
        ("recipe.resolved.yaml", "a: ${b\n", "can't be read: "),
        ("recipe.resolved.yaml", "\0\0", "can't be read: "),
    ],
)
def test_what_a_run_was_made_from_is_damaged(tmp_path, name, content, said):
    (tmp_path / "recipe.resolved.yaml").write_text(RESOLVED)
    (tmp_path / "plugins.lock.json").write_text(LOCK)
    assert changes.of_run(tmp_path) == {"a": "1", "versions.torch": "2"}
    (tmp_path / name).write_text(content)
    with pytest.raises(RecipeError) as raised:
        changes.of_run(tmp_path)
    (problem,) = raised.value.problems
    assert problem.place == str(tmp_path / name) and problem.message.startswith(said)
    assert "--fresh starts over" in problem.remedy and "\n" not in problem.message
    assert exits.code_of(raised.value) == 4
