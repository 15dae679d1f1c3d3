"""The command's frame: lazy commands, errors as one message and a code, other packages in the way."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal

import pytest
from click.testing import CliRunner

from dsplugins import cli, rank
from dsplugins.cli import exits, machine
from dsplugins.cli.columns import columns
from dsplugins.cli.options import words
from dsplugins.contracts import EnvironmentUnfit, Problem, Range, RecipeError
from dsplugins.hookspecs import hookimpl
from dsplugins.manager import Chosen, Plugins
from dsplugins.offers import Offer
from dsplugins.rundir import Occupied
from dsplugins.schedules import Schedule

ROOT = Path(__file__).parents[2]


def dsplugins(*arguments, beside=None):
    """Run the command in a process of its own, with the folder `beside` first on its path."""
    environment = os.environ | ({"PYTHONPATH": str(beside)} if beside else {})
    line = [sys.executable, "-m", "dsplugins", *arguments]
    return subprocess.run(line, capture_output=True, text=True, timeout=120, cwd=ROOT, env=environment)


def install(folder, name, version, entry_points=""):
    """Metadata of a distribution that somebody has installed."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(entry_points)


# -- the frame ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_is_there(name):
    command = importlib.import_module(f"dsplugins.cli.{name}").command
    assert command.name == name
    assert command.get_short_help_str(), "its own help says what it does"


def test_help_lists_every_command_and_imports_none():
    program = (
        "import sys; from dsplugins.cli import main; sys.argv[1:] = ['--help']\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "print(sorted(m for m in sys.modules if m.startswith('dsplugins.cli.')), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stderr == "['dsplugins.cli.exits']\n"
    for name in cli.COMMANDS:
        assert f"\n  {name} " in done.stdout


def test_a_near_name_is_suggested():
    result = CliRunner().invoke(cli.group, ["trian"])
    assert result.exit_code == 2 and "did you mean train?" in result.output
    result = CliRunner().invoke(cli.group, ["qqq"])
    assert result.exit_code == 2 and "did you mean" not in result.output


def test_a_value_that_is_given_as_an_option_is_told_how():
    result = CliRunner().invoke(cli.group, ["check", "tiny.yaml", "--train.steps=40"])
    assert result.exit_code == 2 and "without dashes: train.steps=VALUE" in result.output
    result = CliRunner().invoke(cli.group, ["check", "tiny.yaml", "--qqq"])
    assert result.exit_code == 2 and "dashes" not in result.output


def test_large_numbers_are_explained_in_full():
    result = CliRunner().invoke(cli.group, ["explain", "deepseek_v3/v3_671b.yaml", "train.tokens"])
    assert "  14800000000000  [" in result.output


# -- errors ---------------------------------------------------------------------------------------


@pytest.fixture
def ending(monkeypatch, capsys):
    """A function: what `guarded` makes of an error, as (code, stderr)."""

    def leave(code, message):
        raise SystemExit((code, message))

    monkeypatch.setattr(exits, "leave", leave)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv(exits.DEBUG, raising=False)
    monkeypatch.delenv(rank.RUN, raising=False)

    def of(call):
        with pytest.raises(SystemExit) as end:
            exits.guarded(call)
        return end.value.code

    return of


def raising(error):
    def call():
        raise error

    return call


def usage():
    raise SystemExit(2)


@pytest.mark.parametrize(
    ("call", "code", "reason"),
    [
        (raising(RecipeError([Problem("a is wrong", "a", "mend it")])), 3, "a is wrong"),
        (raising(EnvironmentUnfit("no NCCL")), 4, "no NCCL"),
        (raising(KeyError("oops")), 1, "KeyError: 'oops'"),
        (usage, 2, "usage: its output says what of it"),
    ],
)
def test_what_ends_before_its_recipe_is_read_leaves_its_code_to_launch(
    ending, monkeypatch, tmp_path, call, code, reason
):
    monkeypatch.setenv(rank.RUN, str(tmp_path))
    ending(call)
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["code"], status["reason"]) == (code, reason)


def test_the_status_of_a_run_that_is_under_way_is_its_own(ending, monkeypatch, tmp_path):
    monkeypatch.setenv(rank.RUN, str(tmp_path))
    assert ending(raising(Occupied("a run is under way")))[0] == 4
    assert not (tmp_path / "status.json").exists()


RECIPE, MACHINE = Problem("a is wrong", "a", "mend it"), Problem("no GPU", kind="environment")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (RecipeError([RECIPE]), 3, "a is wrong\n    mend it\n1 problem. Nothing was started."),
        (RecipeError([RECIPE, MACHINE]), 3, "2 problems"),
        (RecipeError([MACHINE]), 4, "no GPU"),
        (EnvironmentUnfit("no NCCL"), 4, "this machine can't run it: no NCCL"),
        (KeyError("oops"), 1, "Traceback"),
    ],
)
def test_errors_become_codes(ending, error, code, said):
    assert ending(raising(error))[0] == code
    assert said in ending(raising(error))[1]


def test_what_all_ranks_know_one_rank_of_a_machine_tells(ending, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert ending(raising(RecipeError([RECIPE]))) == (3, "")
    assert ending(raising(EnvironmentUnfit("no NCCL"))) == (4, "")
    assert "rank 1: " in ending(raising(KeyError("oops")))[1]


def test_processes_that_were_started_do_not_say_that_nothing_was(ending, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    code, said = ending(raising(RecipeError([RECIPE])))
    assert code == 3 and said.endswith("1 problem. No step was taken.")


class Faulty:
    """A listener that fails a call below its hook."""

    @hookimpl
    def ds_grads_ready(self, step, chunks):
        """Fails."""
        self.deeper()

    def deeper(self):
        json.loads("not\nJSON")


def failing_hook():
    offer = Offer("faulty", "event", "somebody", "1.0", None)
    Plugins([Chosen(offer, Faulty(), None)]).event("ds_grads_ready", step=1, chunks=())


def test_a_plugins_failure_is_one_line_with_its_place(ending):
    code, said = ending(failing_hook)
    line = Faulty.deeper.__code__.co_firstlineno + 1
    assert code == 1 and "\n" not in said
    assert said.startswith("plugin faulty failed in ds_grads_ready: JSONDecodeError: ")
    assert f"{__file__}:{line} (dsplugins --debug shows the calls)" in said


def test_debug_shows_the_calls(ending):
    try:
        exits.debug()
        code, said = ending(failing_hook)
    finally:
        del os.environ[exits.DEBUG]
    assert code == 1 and "Traceback" in said and "in deeper" in said
    assert said.splitlines()[-1].startswith("plugin faulty failed in ds_grads_ready")


# -- plugins --------------------------------------------------------------------------------------


def test_list_marks_what_no_recipe_can_name(tmp_path):
    known = "[dsplugins.attention]\nmla = x:X\nNo.Name = x:X\n[dsplugins.event]\nfine = x:X\n"
    install(tmp_path, "somebody", "2.0", known + "[dsplugins.nowhere]\nlost = x:X\n")
    rows = json.loads(dsplugins("plugins", "list", "--json", beside=tmp_path).stdout)
    marked = {(row["name"], row["distribution"]): row["marks"] for row in rows if row["marks"]}
    assert set(marked) == {
        ("mla", "somebody"),
        ("No.Name", "somebody"),
        ("lost", "somebody"),
    }
    assert marked["mla", "somebody"] == ["a recipe must write somebody/mla: dsplugins has this name"]
    assert "no such slot" in marked["lost", "somebody"][0]
    table = dsplugins("plugins", "list", beside=tmp_path).stdout.splitlines()
    assert any(line.split()[:4] == ["event", "fine", "somebody", "2.0"] for line in table)
    assert dsplugins("plugins", "show", "mla", beside=tmp_path).stdout.startswith("mla: attention, from dsp")


def test_show_of_a_plugin_that_cannot_be_imported(tmp_path):
    install(tmp_path, "somebody", "2.0", "[dsplugins.event]\nbroken = no_such_module:X\n")
    done = dsplugins("plugins", "show", "broken", beside=tmp_path)
    assert done.returncode == 4 and "somebody can't be imported: ModuleNotFoundError" in done.stderr


def test_show_reads_like_a_page():
    said = dsplugins("plugins", "show", "aux_free").stdout
    assert said.startswith("aux_free: router, from dsplugins ")
    assert "\n  update_rate: number or schedule, 0.0 to 1.0, default 0.001\n      gamma: " in said
    assert "hooks: ds_settings, ds_check, ds_router" in said
    done = dsplugins("plugins", "show", "aux_fre")
    assert done.returncode == 2 and "did you mean aux_free?" in done.stderr


@pytest.mark.parametrize(
    ("hint", "said"),
    [
        (Annotated[float, Range(0.0, 1.0)], "number, 0.0 to 1.0"),
        (Annotated[int, Range(1)], "whole number, at least 1"),
        (Annotated[int | None, Range(maximum=9)], "whole number | null, at most 9"),
        (Literal["fp32", "bf16"], "fp32 | bf16"),
        (tuple[str, ...], "list of text"),
        (Schedule, "number or schedule"),
    ],
)
def test_types_in_words(hint, said):
    assert words(hint) == said


def test_columns_line_up():
    assert columns([["a", "bcd", ""], ["efg", "h", "long one"]]) == "a    bcd\nefg  h    long one"


# -- doctor ---------------------------------------------------------------------------------------


def diagnosis(beside=None):
    done = dsplugins("doctor", "--json", beside=beside)
    return done.returncode, {row["what"]: row for row in json.loads(done.stdout)}


def test_doctor_is_content_with_this_machine():
    code, rows = diagnosis()
    assert code == 0, rows
    assert rows["gloo"]["found"] == "starts" and rows["python"]["found"] == sys.version.split()[0]
    assert not [row for row in rows.values() if row["state"] == "-" and not row["found"]]


def test_doctor_finds_what_is_in_the_way(tmp_path):
    install(tmp_path, "apex", "0.9.10.dev0")
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise ImportError('a web toolkit')")
    install(tmp_path, "pluggy", "0.13")
    (tmp_path / "megatron" / "core").mkdir(parents=True)
    (tmp_path / "megatron" / "core" / "__init__.py").write_text("")
    code, rows = diagnosis(tmp_path)
    assert code == 4
    assert {name for name, row in rows.items() if row["state"] == "WRONG"} == {
        "apex",
        "pluggy",
        "megatron.core",
        "distributions",
    }
    assert "pip uninstall apex" in rows["apex"]["remedy"]
    assert "0.13, but " in rows["pluggy"]["found"]
    assert str(tmp_path) in rows["megatron.core"]["found"]
    assert "pluggy 0.13 and " in rows["distributions"]["found"]


def test_nvidias_apex_is_fine(tmp_path, monkeypatch):
    (tmp_path / "apex" / "optimizers").mkdir(parents=True)
    (tmp_path / "apex" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert machine._apex()["state"] == "ok"


def test_a_gpu_that_torch_cannot_use_is_wrong(monkeypatch):
    torch = SimpleNamespace(
        cuda=SimpleNamespace(is_available=lambda: False), version=SimpleNamespace(cuda="13.0")
    )
    monkeypatch.setattr(machine.os.path, "exists", lambda path: path == "/dev/nvidiactl")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert machine._cuda(torch)["state"] == "WRONG"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert machine._cuda(torch)["state"] == "-"


def test_a_gloo_that_does_not_start_is_wrong():
    def refuse(*arguments, **named):
        raise RuntimeError("unable to resolve hostname\nbacktrace")

    distributed = SimpleNamespace(
        is_available=lambda: True,
        is_gloo_available=lambda: True,
        HashStore=object,
        init_process_group=refuse,
    )
    found = machine._gloo(SimpleNamespace(distributed=distributed))
    assert found["state"] == "WRONG" and found["found"] == "does not start: unable to resolve hostname"
    assert "GLOO_SOCKET_IFNAME" in found["remedy"]


def test_nccl_is_needed_only_beside_a_gpu():
    torch = SimpleNamespace(distributed=SimpleNamespace(is_available=lambda: False))
    assert machine._nccl(torch, cuda=True)["state"] == "WRONG"
    assert machine._nccl(torch, cuda=False)["state"] == "-"


def test_recipes_come_with_their_first_comment():
    rows = {row["recipe"]: row["about"] for row in json.loads(dsplugins("recipes", "--json").stdout)}
    assert rows["deepseek_v3/tiny_cpu.yaml"].startswith("DeepSeek-V3 in miniature")
    assert all(rows.values()), "every shipped recipe starts with a comment"
