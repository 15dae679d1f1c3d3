"""The page of a run: what it shows of one that is complete, one under way and one that failed."""

from __future__ import annotations

import base64
import json
import re

import pytest
from click.testing import CliRunner

from dsplugins.cli import exits
from dsplugins.cli.report import command
from dsplugins.contracts import RecipeError
from dsplugins.report.facts import read
from dsplugins.report.page import page

RESOLVED = "plugins:\n  cpu: {}\ntrain:\n  steps: 4 # <b>\n"


def row(step, **more):
    return {
        "step": step,
        "tokens": 256 * step,
        "loss": 5.0 - 0.1 * step,
        "mtp_loss": None,
        "grad_norm": 1.0,
        "learning_rate": 1e-3,
        "global_batch": 8,
        "tokens_per_second": 100.0 * step,
        "step_seconds": 30.0,
        "skipped": step == 2,
        "expert_load": [[1.0, 1.0], [0.5, 1.5]],
    } | more


def lines(path, rows):
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))


@pytest.fixture
def run(tmp_path):
    """A complete run of four steps."""
    item = {"name": "cpu", "slot": "platform", "distribution": "dsplugins", "version": "0.1.0"}
    lock = {"plugins": [{**item, "class": "x:Y", "options": {"a": 1}}], "versions": {"torch": "2.14"}}
    evaluation = {"step": 4, "loss": 4.6, "mtp_loss": 4.7, "mtp_acceptance": 0.25, "sequences": 8}
    evaluation |= {
        "bits_per_byte": 6.63,
        "max_vio": 0.5,
        "expert_load": {"decoder.1": [4, 4], "mtp.0": [2, 6]},
    }
    ended = {"baselines": {"bigram": 2.4}, "completion": ["def f", "(<i>)", "(x)"]}
    ended |= {"peak_memory": 2**31, "memory": {"weights": 2**20}}
    notes = {
        "plugins.lock.json": lock,
        "built.json": {"parameters": "94,848 total", "layers": [{"layers": "decoder.0", "mlp": "MLP"}]},
        "run.json": ended,
        "status.json": {"code": 0, "reason": "complete"},
    }
    for name, content in notes.items():
        (tmp_path / name).write_text(json.dumps(content))
    (tmp_path / "recipe.resolved.yaml").write_text(RESOLVED)
    lines(tmp_path / "metrics.jsonl", [row(step) for step in range(1, 5)])
    lines(tmp_path / "evaluations.jsonl", [evaluation])
    lines(tmp_path / "changes.jsonl", [{"after_step": 2, "changes": ["train.steps: 3 -> 4"]}])
    (tmp_path / "checkpoints" / "step-00000004").mkdir(parents=True)
    return tmp_path


def text(html):
    return " ".join(re.sub(r"<[^>]+>", " ", re.sub(r"<style>.*?</style>", "", html, flags=re.S)).split())


def test_a_complete_run(run):
    html = page(read(run))
    shown = text(html)
    for wanted in (
        "state complete",
        "steps 4, 1 of them skipped",
        "tokens 1,024",
        "time in steps 2 min 0 s",
        "tokens a second 250 (median)",
        "peak memory of rank 0 2.00 GiB",
        "state of a rank, at most weights 1.0 MiB",
        "parameters 94,848 total",
        "4 4.6 6.63 4.7 25.0% 0.5 8",
        "A bigram model of the same text: 2.4 nats",
        "platform cpu dsplugins 0.1.0 a=1",
        "after step 2 train.steps: 3 -&gt; 4",
        "checkpoints step-00000004",
        "the model writes (&lt;i&gt;)",
        "steps: 4 # &lt;b&gt;",
    ):
        assert wanted in shown, wanted


def test_pictures_are_inside_and_nothing_comes_from_elsewhere(run):
    html = page(read(run))
    addresses = re.findall(r'(?:src|href)="([^"]+)"', html)
    assert len(addresses) == 6
    for address in addresses:
        kind, _, data = address.partition(",")
        assert kind == "data:image/png;base64" and base64.b64decode(data).startswith(b"\x89PNG")


def test_layers_have_the_names_that_evaluations_give():
    from types import SimpleNamespace

    from dsplugins.report.page import _layers

    named = SimpleNamespace(evaluations=[{"expert_load": {"decoder.1": [], "mtp.0": []}}])
    assert _layers(named, 2) == ["decoder.1", "mtp.0"]
    assert _layers(SimpleNamespace(evaluations=[]), 2) == ["router 0", "router 1"]


def test_a_run_that_has_just_begun(tmp_path):
    (tmp_path / "recipe.resolved.yaml").write_text(RESOLVED)
    shown = text(page(read(tmp_path)))
    assert "state no status.json" in shown and "checkpoints none" in shown


def test_a_run_that_is_being_written(run):
    """Checkpoints that don't count yet aren't offered, damaged ones are, by name; half lines are left out."""
    for name in ("step-00000005.partial", "step-00000003.damaged"):
        (run / "checkpoints" / name).mkdir()
    for name in ("metrics.jsonl", "evaluations.jsonl", "changes.jsonl"):
        with (run / name).open("a") as file:
            file.write('{"step": 5, "lo')
    shown = text(page(read(run)))
    assert "checkpoints step-00000003.damaged, step-00000004" in shown and "partial" not in shown


@pytest.mark.parametrize("name", ["run.json", "status.json", "built.json", "plugins.lock.json"])
def test_a_damaged_file_is_named(run, name):
    (run / name).write_text((run / name).read_text()[:-3])
    with pytest.raises(RecipeError, match="is not JSON") as raised:
        CliRunner().invoke(command, [str(run)], catch_exceptions=False)
    assert exits.code_of(raised.value) == 4
    said = exits.message_of(raised.value)
    assert said.startswith(f"{run / name}: is not JSON: ") and said.endswith("the page is made without")


def test_a_run_that_failed_says_why(run):
    (run / "status.json").write_text(json.dumps({"code": 1, "reason": "rank 1: NotFinite: step 5"}))
    (run / "run.json").unlink()
    (run / "not_finite" / "step-00000005").mkdir(parents=True)
    lines(run / "metrics.jsonl", [row(1), row(2, loss=None)])  # what was not finite is null
    shown = text(page(read(run)))
    assert "state rank 1: NotFinite: step 5 (exit code 1)" in shown
    assert "steps that were not finite step-00000005" in shown


def test_the_command(run, tmp_path_factory):
    done = CliRunner().invoke(command, [str(run)])
    assert done.exit_code == 0 and (run / "report.html").read_text().startswith("<!doctype html>")
    nothing = CliRunner().invoke(command, [str(tmp_path_factory.mktemp("nothing"))])
    assert nothing.exit_code == 2 and "holds no run" in nothing.output
