"""What the pages tell a reader to write and to type: recipes are good ones, commands print what is shown."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys

import forks
import pytest
from pages import ROOT, blocks, commands, name, written

from dsplugins.plan import prepare
from dsplugins.recipe import Recipe
from dsplugins.settings import ledger

PAGES = [page for page in written() if page.name not in ("writing.md", "testing.md", "slots.md")]
"""Those need packages of their own: test_writing.py and test_slots.py go through them."""
REFUSED = "Nothing was started."
NOT_HERE = {
    "bash launch/test.sh": "runs this test, among others",
    "bash launch/quickstart.sh": "minutes: record_quickstart.py runs it; its overrides are checked below",
    "torchrun --nnodes": "needs a cluster: its recipe is checked below",
    "python docs/record_quickstart.py": "minutes",
    "python docs/generate.py": "test_docs.py does",
    "python -m sphinx": "test_docs.py does",
}
"""Start of a line -> why it isn't run."""
CHECK = """
import json, pathlib, sys
from dsplugins.meta import answer
pathlib.Path(sys.argv[1]).write_text(json.dumps([answer(recipe, []) for recipe in sys.argv[2:]]))
"""


def elsewhere(command):
    return any(command.line.startswith(start) for start in NOT_HERE)


def files_of(page, folder):
    """Write the files that the page shows, and give those that are recipes."""
    for block in blocks(page):
        if block.file:
            (folder / block.file).write_text(block.text)
    return [folder / block.file for block in blocks(page, "yaml") if block.file]


def good(recipe, overrides=()):
    """The plan; RecipeError with every problem of the text, the plugins, the sizes and the writers."""
    loaded = Recipe.load(recipe, overrides)
    plugins, plan = prepare(loaded)
    assert not (problems := ledger(plan, plugins, loaded).problems), problems
    return plan


def test_every_yaml_block_is_a_recipe_with_a_name():
    unnamed = [str(block) for page in PAGES for block in blocks(page, "yaml") if not block.file]
    assert not unnamed, f"first line: `# NAME.yaml`: {unnamed}"


def test_every_recipe_passes_check(tmp_path):
    """As `dsplugins check` does it, but all of them in one child process: most of its time is the imports."""
    recipes = []
    for number, page in enumerate(PAGES):
        folder = tmp_path / str(number)
        folder.mkdir()
        recipes += files_of(page, folder)
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TORCHDYNAMO_DISABLE": "1"}
    line = [sys.executable, "-c", CHECK, tmp_path / "answers.json", *recipes]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    answers = json.loads((tmp_path / "answers.json").read_text())
    assert len(answers) == len(recipes) > 3
    for recipe, answer in zip(recipes, answers, strict=True):
        # What a reader's machine has, such as a corpus, need not be on this one.
        problems = [problem for problem in answer["problems"] if problem["kind"] == "recipe"]
        assert answer["built"] and not problems, f"{recipe.name}: {problems}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_other_console_line_runs_and_prints_what_is_shown(page, tmp_path):
    files_of(page, tmp_path)
    environment = {**os.environ, "COLUMNS": "200"}
    for command in commands(page):
        if elsewhere(command):
            continue
        program, *arguments = shlex.split(command.line)
        assert program in ("dsplugins", "python"), (
            f"{command.block}: list {command.line} in NOT_HERE, and why"
        )
        start = [sys.executable, "-m", "dsplugins"] if program == "dsplugins" else [sys.executable]
        own = (tmp_path / arguments[0]).exists()  # a script that the page shows
        folder = ROOT if program == "python" and not own else tmp_path
        line = [*start, *arguments]
        done = forks.run(line, cwd=folder, env=environment)
        wanted = 3 if any(shown.endswith(REFUSED) for shown in command.shown) else 0
        assert done.returncode == wanted, f"{command.block}: {command.line}\n{done.stderr}"
        printed = done.stdout + done.stderr
        missing = command.matches(printed)
        assert missing is None, f"{command.block}: {command.line} did not print {missing!r}, but\n{printed}"


def runs():
    """Lines that start a run and are too much for a test."""
    return [command for page in PAGES for command in commands(page) if elsewhere(command)]


def test_lines_that_are_not_run_are_still_in_the_docs():
    unused = [s for s in NOT_HERE if not any(command.line.startswith(s) for command in runs())]
    assert not unused, f"no page has {unused} any more"


@pytest.mark.parametrize("line", sorted({command.line for command in runs()}))
def test_what_is_not_run_here_could_be_run(line):
    words = shlex.split(line)
    if words[0] == "torchrun":
        recipe, *overrides = words[words.index("train") + 1 :]
        sizes = [int(words[words.index(option) + 1]) for option in ("--nnodes", "--nproc-per-node")]
        assert good(recipe, overrides).run.world_size == sizes[0] * sizes[1]
        return
    if words[1] == "-m":
        return
    script = ROOT / words[1]
    assert script.is_file()
    if script.name == "quickstart.sh":
        good("deepseek_v3/tiny_cpu.yaml", [word for word in words[2:] if not word.startswith("--")])
