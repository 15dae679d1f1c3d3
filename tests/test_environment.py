"""What plugins need in the environment: one value, set in time, or a refusal that says what to type."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from dsplugins.contracts import EnvironmentUnfit
from dsplugins.environment import contradictions, needed, provide, told

NAME = "DSPLUGINS_TEST_CONNECTIONS"


def plugin(name, **env):
    return SimpleNamespace(name=name, plugin=SimpleNamespace(env=env))


def plain(name):
    return SimpleNamespace(name=name, plugin=object())


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv(NAME, "")
    monkeypatch.delenv(NAME)


def test_what_is_missing_is_set():
    provide([plain("a"), plugin("b", **{NAME: "32"}), plugin("c", **{NAME: "32"})])
    assert os.environ[NAME] == "32"


def test_what_is_needed_is_told_with_who_needs_it():
    chosen = [plain("a"), plugin("b", **{NAME: "32"}), plugin("c", **{NAME: "32", "OTHER": "x y"})]
    assert told(chosen) == [f"{NAME}=32 (b, c)", "OTHER='x y' (c)"]
    assert needed(chosen) == {NAME: "32", "OTHER": "x y"}


def test_another_value_is_refused(monkeypatch):
    monkeypatch.setenv(NAME, "1")
    with pytest.raises(
        EnvironmentUnfit, match=f"{NAME} is '1', plugin b needs '32': export {NAME}=32, or unset"
    ):
        provide([plugin("b", **{NAME: "32"})])
    assert os.environ[NAME] == "1"


def test_a_rank_that_has_torch_already_is_refused(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setitem(sys.modules, "torch", object())
    with pytest.raises(EnvironmentUnfit, match=f"export {NAME}=32 before torchrun"):
        provide([plugin("b", **{NAME: "32"})])


@pytest.mark.parametrize(("name", "late"), [(NAME, False), ("PYTHONTEST", True), ("LD_TEST", True)])
def test_a_rank_without_torch_sets_what_it_still_can(monkeypatch, name, late):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setenv(name, "")
    monkeypatch.delenv(name)
    if late:
        with pytest.raises(EnvironmentUnfit, match=f"export {name}=1"):
            provide([plugin("b", **{name: "1"})])
    else:
        provide([plugin("b", **{name: "1"})])
        assert os.environ[name] == "1"


def test_the_loop_is_imported_without_torch():
    """So that a rank can still set what torch reads when it is imported."""
    program = "import sys, dsplugins.train, dsplugins.cli.train; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_two_values_are_a_problem_of_the_recipe():
    chosen = [plugin("a", **{NAME: "1"}), plugin("b", **{NAME: "32"}), plugin("c", **{NAME: "1"})]
    (problem,) = contradictions(chosen)
    assert problem.message == f"plugins.b: needs {NAME}=32 in the environment, a needs {NAME}=1"
    assert problem.key == "plugins.b" and "`a: null`" in problem.remedy


def test_explain_has_it_with_its_plugin(monkeypatch):
    from click.testing import CliRunner

    from dsplugins.cli.explain import command
    from dsplugins.plugins.event.curves import Curves

    monkeypatch.setattr(Curves, "env", {NAME: "32"})
    recipe = str(Path(__file__).parent / "tiny.yaml")
    done = CliRunner().invoke(command, [recipe, "environment", "plugins.curves={}"])
    assert done.output.split() == [f"environment.{NAME}", "32", "[plugin", "curves]"]
