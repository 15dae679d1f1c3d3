"""The communication experiment: its record of run directories made by hand, and the page that quotes it."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import pytest
from click.testing import CliRunner

from dsplugins.experiments import communication

DOCS = Path(__file__).parents[2] / "docs"


def row(kind, group, payload, predicted, sent):
    numbers = {"calls": 2.0, "payload": payload, "predicted": predicted, "sent": sent, "sent_max": sent}
    return {"kind": kind, "group": group, **numbers}


ROWS = [
    row("all_to_all", "expert", 4096.0, 4096.0, 2048.5),
    row("all_reduce", "tensor x context", 1024.0, None, 1024.0),
    row("all_reduce", "world", 280.0, 280.0, 280.0),
]


def left_behind(directory, rows=ROWS):
    """A run directory as far as the experiment reads it: steps 2 and 4 counted, and slower by a tenth."""
    directory.mkdir(parents=True)
    table = {"steps": [2, 4], "ranks": 2, "rows": rows}
    (directory / "bytes_on_wire.json").write_text(json.dumps(table))
    steps = [{"step": n, "step_seconds": 1.1} for n in (1, 2, 3, 4)]
    steps[0]["step_seconds"], steps[2]["step_seconds"] = 9.0, 1.0
    steps[1]["wire_bytes"] = steps[3]["wire_bytes"] = 3352.5
    (directory / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))


def test_seconds_of_counted_steps_stand_beside_those_of_the_others(tmp_path):
    left_behind(tmp_path / "run")
    found = communication.measure("expert 2", tmp_path / "run")
    assert found["step_seconds"] == {"counted": 1.1, "others": 1.0} and found["counted_over_others"] == 1.1
    assert found["rows"] == ROWS and found["steps"] == [2, 4]


@pytest.mark.parametrize(("predicted", "holds"), [(4096.0, True), (4095.0, False)])
def test_one_byte_more_or_less_and_it_does_not_hold(tmp_path, predicted, holds):
    left_behind(tmp_path / "run", [row("all_to_all", "expert", 4096.0, predicted, 2048.5), *ROWS[1:]])
    found = communication.results([communication.measure("x", tmp_path / "run")], 4, [])
    assert found["holds"] is holds
    assert (found["rows"], found["rows_predicted"]) == (3, 2)


def test_the_table_leaves_out_what_is_small_and_says_what_nobody_predicted(tmp_path):
    left_behind(tmp_path / "run")
    found = communication.results([communication.measure("expert 2", tmp_path / "run")], 4, [])
    title, *lines = communication.table(found)
    assert len(title) == 7
    assert lines == [
        ["expert 2", "all_to_all", "expert", "2", "4,096", "4,096", "2,048"],
        ["expert 2", "all_reduce", "tensor x context", "2", "1,024", "not predicted", "1,024"],
    ]


def test_every_layout_is_two_processes_that_can_run():
    """Recipe, plugins and sizes of each, as `check` reads them first."""
    from dsplugins.plan import prepare
    from dsplugins.recipe import Recipe

    planned = list(communication.runs(4))
    assert len({run.name for _, run in planned}) == len(communication.LAYOUTS)
    for _, run in planned:
        _, plan = prepare(Recipe.load(run.recipe, run.overrides))
        assert plan.run.world_size == 2 and plan.train.steps == 4


def test_the_command_writes_a_record_and_says_where_it_does_not_hold(tmp_path):
    from dsplugins.cli import communication as command

    def fake(runs, where, jobs):
        for run in runs:
            left_behind(where / run.name, [row("send", "pipeline", 2000.0, 2001.0, 2000.0)])

    with mock.patch.object(command, "train_all", fake):
        done = CliRunner().invoke(command.communication, ["--out", str(tmp_path), "train.seed=3"])
    assert done.exit_code == 1 and "NOT ALL AS THEY ARE COUNTED" in done.output, done.output
    record = json.loads((tmp_path / "communication.json").read_text())
    assert record["command"] == "dsplugins experiment communication --steps 20 train.seed=3"
    assert "train.seed=3" in record["results"]["overrides"]
    assert len(record["results"]["runs"]) == len(communication.LAYOUTS)


# -- the record in the repository ------------------------------------------------------------------


def test_the_page_quotes_the_record_line_by_line():
    results = json.loads((DOCS / "records" / "communication.json").read_text())["results"]
    page = (DOCS / "tuning" / "communication.md").read_text()
    assert results["holds"] and results["layouts"].keys() == communication.LAYOUTS.keys()
    quoted = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("|")]
    told = [[cell.strip("`") for cell in line] for line in quoted]
    for line in communication.table(results, least=10_000):
        assert line in told, line
    assert f"{results['counted_over_others']:.3f}" in page
