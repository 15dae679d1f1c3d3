"""docs/plugins/writing.md and testing.md from top to bottom, as a reader goes through them."""

from __future__ import annotations

import os
import subprocess
import sys

import forks
import pytest
from pages import DOCS, blocks, commands, name

WRITING, TESTING = DOCS / "plugins" / "writing.md", DOCS / "plugins" / "testing.md"
INSTALL = "pip install -e "


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """A folder with every file that the two pages show, and where the package is installed for it."""
    folder = tmp_path_factory.mktemp("reader")
    for block in [*blocks(WRITING), *blocks(TESTING)]:
        if block.language != "console":
            assert block.file, f"{block}: its first line names no file"
            file = folder / block.file
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.text)
    return folder


def typed(line, folder):
    """What a line of the page prints. `pip install -e` goes into a folder here, not into this environment."""
    site = str(folder / "site")
    words = line.split()
    if line.startswith(INSTALL):
        offline = ["--quiet", "--no-deps", "--no-build-isolation", "--target", site]
        words = [sys.executable, "-m", "pip", "install", *offline, f"./{line.removeprefix(INSTALL)}"]
    elif words[0] == "dsplugins":
        words = [sys.executable, "-m", *words]
    elif words[0] == "python":
        words = [sys.executable, *words[1:], "-p", "no:cacheprovider"]
    known = {"cwd": folder, "env": {**os.environ, "PYTHONPATH": site, "COLUMNS": "200"}, "timeout": 300}
    if words[1:3] == ["-m", "dsplugins"]:
        done = forks.run(words, **known)
    else:
        done = subprocess.run(words, capture_output=True, text=True, **known)
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("page", [WRITING, TESTING], ids=name)
def test_every_line_of_the_page_works_and_prints_what_it_says(page, reader):
    if page == TESTING and not (reader / "site").exists():
        typed(commands(WRITING)[0].line, reader)
    for command in commands(page):
        printed = typed(command.line, reader)
        missing = command.matches(printed)
        assert missing is None, f"{command.block}: {command.line} did not print {missing!r}, but\n{printed}"
