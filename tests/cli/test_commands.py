"""The commands as a user types them."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*arguments, code=0):
    line = [sys.executable, "-m", "dsplugins", *arguments]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == code, done.stderr
    return done.stdout


@pytest.mark.parametrize("arguments", [["--help"], ["plugins", "list"]])
def test_light_commands_import_neither_torch_nor_omegaconf(arguments):
    program = (
        "import sys; sys.argv[0] = 'dsplugins'\n"
        "from dsplugins.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'omegaconf', 'megatron'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_list_is_what_the_package_declares():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    wanted = {(group.removeprefix("dsplugins."), name) for group, names in declared.items() for name in names}
    listed = json.loads(run("plugins", "list", "--json"))
    assert {(row["slot"], row["name"]) for row in listed if row["distribution"] == "dsplugins"} == wanted


def test_every_listed_plugin_can_be_shown_with_documented_options():
    from dsplugins.cli.plugins import _options
    from dsplugins.offers import offers

    for offer in offers():
        cls = offer.entry_point.load()
        assert cls.__doc__, offer.name
        assert all(option["about"] for option in _options(cls)), offer.name


def test_show_names_hooks_and_options():
    facts = json.loads(run("plugins", "show", "aux_free", "--json"))
    assert "ds_router" in facts["hooks"]
    assert {option["name"] for option in facts["options"]} == {"sequence_loss", "update_rate"}
    run("plugins", "show", "nothing", code=2)


def test_explain_says_value_and_origin():
    rows = json.loads(run("explain", "tests/tiny.yaml", "model", "model.hidden_size=64", "--json"))
    found = {row["key"]: (row["value"], row["origin"]) for row in rows}
    assert found["model.hidden_size"] == (64, "command line")
    assert found["model.multi_latent_attention"][1] == "plugin mla"
    assert found["model.tensor_model_parallel_size"] == (1, "derived")
    assert found["model.normalization"][1].startswith("recipes/base.yaml:")


def test_explain_speaks_yaml():
    import yaml

    batch = "train.global_batch=[{until: 8 steps, from: 8, to: 16}, {value: 16}]"
    keys = ["train.twin", "train.tokens", "plugins.adamw.no_decay", "train.global_batch"]
    lines = run("explain", "tests/tiny.yaml", *keys, batch).splitlines()
    shown = dict(line.rpartition("  [")[0].split(maxsplit=1) for line in lines)
    assert [yaml.safe_load(shown[key]) for key in keys[:3]] == [False, None, ["vectors"]]
    assert shown["train.global_batch"] == "8 to 16 until 8 steps, then 16"
    (row,) = json.loads(run("explain", "tests/tiny.yaml", "train.global_batch", batch, "--json"))
    assert row["value"] == [{"until": "8 steps", "from": 8, "to": 16}, {"value": 16}]


def test_explain_knows_fields_that_nobody_writes():
    (row,) = json.loads(run("explain", "tests/tiny.yaml", "model.rotary_base", "--json"))
    assert row == {"key": "model.rotary_base", "value": 10000, "origin": "declared by megatron-core"}
    assert "follows model.bf16" in run("explain", "tests/tiny.yaml", "model.params_dtype")
    run("explain", "tests/tiny.yaml", "model.hidden_sice", code=2)


def test_recipes_and_doctor():
    assert "deepseek_v3/v3_671b.yaml" in run("recipes")
    rows = {row["what"]: row for row in json.loads(run("doctor", "--json"))}
    assert rows["megatron-core"]["state"] == "ok" and rows["gloo"]["state"] == "ok"
