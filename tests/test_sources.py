"""Where a plugin's code came from, and which driver ran it, stand in the run directory."""

from __future__ import annotations

import json
import subprocess

import pytest

from dsplugins import rundir
from dsplugins.sources import commit, source


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Install `of-someone` as pip does, with what it writes of where that came from."""

    def install(told):
        information = tmp_path / "of_someone-1.dist-info"
        information.mkdir()
        (information / "METADATA").write_text("Metadata-Version: 2.1\nName: of-someone\nVersion: 1\n")
        if told is not None:
            (information / "direct_url.json").write_text(json.dumps(told))
        monkeypatch.syspath_prepend(tmp_path)
        source.cache_clear()
        return source("of-someone")

    yield install
    source.cache_clear()


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (None, None),
        ({"url": "https://x.org/a.whl", "archive_info": {}}, "https://x.org/a.whl"),
        ({"url": "file:///somewhere/here", "dir_info": {}}, "folder"),
        (
            {"url": "https://x.org/a.git", "vcs_info": {"vcs": "git", "commit_id": "ab1"}},
            "https://x.org/a.git ab1",
        ),
        ({"url": "file:///nowhere", "dir_info": {"editable": True}}, "editable, not in git"),
    ],
)
def test_as_pip_wrote_it_down(installed, told, expected):
    assert installed(told) == expected


def test_a_checkout_has_a_commit_and_a_plus_where_it_was_changed(installed, tmp_path):
    folder = tmp_path / "with space"
    folder.mkdir()
    git = ["git", "-C", folder, "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    (folder / "file").write_text("one")
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "one"], check=True)
    number = commit(folder)
    assert number and len(number) == 40
    (folder / "file").write_text("two")
    said = installed({"url": f"file://{str(folder).replace(' ', '%20')}", "dir_info": {"editable": True}})
    assert said == f"editable, {number}+"


def test_a_driver_is_among_the_versions_where_there_is_one(tmp_path, monkeypatch):
    monkeypatch.setattr(rundir, "DRIVER", tmp_path / "version")
    assert "driver" not in rundir.versions()
    (tmp_path / "version").write_text("580.1\n")
    assert rundir.versions()["driver"] == "580.1"
