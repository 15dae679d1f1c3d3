"""Somebody else's package: installed, named in a recipe, trained with; and not imported when not named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import forks
import pytest

HERE = Path(__file__).parent
TINY = HERE / "tiny.yaml"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the example package installed by pip, to be put on the path."""
    folder = tmp_path_factory.mktemp("site")
    copy = tmp_path_factory.mktemp("source") / "example"
    subprocess.run(["cp", "-r", str(HERE / "example_plugin"), str(copy)], check=True)
    line = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*line, "--target", str(folder), str(copy)], check=True, timeout=120)
    return folder


def run(installed, cwd, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    line = [sys.executable, "-m", "dsplugins", *arguments]
    return forks.run(line, cwd=cwd, env=environment)


def test_it_is_listed_and_shown_from_its_package(installed, tmp_path):
    rows = json.loads(run(installed, tmp_path, "plugins", "list", "--json").stdout)
    mine = {(row["slot"], row["name"]) for row in rows if row["distribution"] == "first-come"}
    assert mine == {("router", "first_come"), ("event", "step_book")}


def test_it_trains_and_reaches_mtp(installed, tmp_path):
    swap = ["plugins.aux_free=null", "plugins.first_come={temperature: 0.5}", "plugins.step_book={}"]
    done = run(installed, tmp_path, "train", str(TINY), *swap, "train.steps=2", "run.directory=out")
    assert done.returncode == 0, done.stderr
    book = json.loads((tmp_path / "out" / "book.json").read_text())
    # Three decoder layers and MTP's: each counts every token once for each of its two experts.
    assert [page["expert_tokens"] for page in book] == [4 * 8 * 32 * 2] * 2
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["expert_tokens"] == book[0]["expert_tokens"] and rows[0]["aux_loss"] == 0.0


def test_its_state_goes_on_with_the_run(installed, tmp_path):
    line = ["train", str(TINY), "plugins.step_book={}", "evaluate.sequences=0", "run.directory=out"]
    assert run(installed, tmp_path, *line, "train.steps=2").returncode == 0
    done = run(installed, tmp_path, *line, "train.steps=3", "--accept-changes")
    assert done.returncode == 0, done.stderr
    book = json.loads((tmp_path / "out" / "book.json").read_text())
    assert [page["step"] for page in book] == [1, 2, 3]


def test_options_are_checked_with_its_name(installed, tmp_path):
    swap = ["plugins.aux_free=null", "plugins.first_come={temperatur: 0.5}"]
    done = run(installed, tmp_path, "explain", str(TINY), *swap)
    assert done.returncode == 3 and "did you mean temperature" in done.stderr


def test_nothing_of_it_is_imported_when_no_recipe_names_it(installed, tmp_path):
    program = (
        "import sys\n"
        "from dsplugins.plan import prepare\n"
        "from dsplugins.recipe import Recipe\n"
        f"prepare(Recipe.load({str(TINY)!r}))\n"
        "assert 'first_come' not in sys.modules\n"
        f"prepare(Recipe.load({str(TINY)!r}, ['plugins.aux_free=null', 'plugins.first_come={{}}']))\n"
        "assert 'first_come' in sys.modules\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
