"""What is shipped can be run: every recipe passes `check`; models and machines stand in files of their own.

The 671B recipe's check has its tests in tests/cli/test_check.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dsplugins.recipe import Recipe, recipe_folder

ROOT = Path(__file__).parents[2]
SHIPPED = sorted(path.relative_to(recipe_folder()).as_posix() for path in recipe_folder().rglob("*.yaml"))
MACHINES = [name for name in SHIPPED if name.startswith("hardware/")]
RUNNABLE = [name for name in SHIPPED if name not in (*MACHINES, "base.yaml")]
CHECKED = [name for name in RUNNABLE if name != "deepseek_v3/v3_671b.yaml"]
CHILD = """
import json, sys
from dsplugins.meta import answer
print("ANSWERS" + json.dumps({name: answer(name, []) for name in json.load(sys.stdin)}))
"""


@pytest.fixture(scope="module")
def answers():
    """What check's child process says of each recipe."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        input=json.dumps(CHECKED),
        capture_output=True,
        text=True,
        timeout=600,
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "TORCHDYNAMO_DISABLE": "1"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.split("ANSWERS")[1])


@pytest.mark.parametrize("name", CHECKED)
def test_recipe_passes_check(answers, name):
    assert [p for p in answers[name]["problems"] if p["kind"] == "recipe"] == []
    assert answers[name]["built"]


def test_the_16b_shape_has_the_published_number_of_parameters(answers):
    """inference/configs/config_16B.json, whose gate has no bias; V3 has one an expert, 26 x 64."""
    counts = answers["deepseek_v3/v2_lite_16b.yaml"]["built"]["counts"]
    biases = 26 * 64
    published = {
        "model": 15_706_484_224,
        "activated_embedding_and_head": 2_661_150_208,
        "activated_head_only": 2_451_435_008,
        "activated_neither": 2_241_719_808,
    }
    for row, trainable in published.items():
        assert counts[row] == {"trainable": trainable, "with_correction_biases": trainable + biases}, row


def test_the_tiny_model_is_the_same_on_cpu_and_gpu():
    cpu, gpu = (Recipe.load(f"deepseek_v3/tiny_{machine}.yaml") for machine in ("cpu", "gpu"))
    for section in ("model", "train", "optimizer", "data", "evaluate"):
        assert cpu.sections[section] == gpu.sections[section]
    assert {**cpu.plugins, "cuda": {}}.keys() - {"cpu"} == gpu.plugins.keys()


@pytest.mark.parametrize("name", MACHINES)
def test_a_machine_says_nothing_of_model_and_training(name):
    text = yaml.safe_load((recipe_folder() / name).read_text())
    assert text.keys() <= {"extends", "plugins", "parallel", "model", "train", "run"}
    assert text["plugins"].keys() <= {"cpu", "cuda", "te", "torch_local"}
    assert text.get("model", {}).keys() <= {"pipeline_model_parallel_layout"}
    assert text.get("train", {}).keys() <= {"micro_batch"}
    assert text["run"].keys() == {"world_size"}


@pytest.mark.parametrize("name", [name for name in RUNNABLE if name.startswith("deepseek_v3/")])
def test_a_model_takes_its_machine_from_a_file_of_its_own(name):
    recipe = Recipe.load(name)
    places = {key: recipe.place(key) for key in ("parallel", "run.world_size")}
    assert all("hardware/" in place for place in places.values()), places
    machine = {"cpu", "cuda", "te"} & recipe.plugins.keys()
    assert machine and all("hardware/" in recipe.place(f"plugins.{plugin}") for plugin in machine)
