"""A wheel holds the recipes, and the command finds them where there is no checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input"]
OFFLINE = ["--no-deps", "--no-build-isolation", "--no-index"]


def shipped():
    """Recipes of the checkout, as their names on the command line."""
    return {path.relative_to(ROOT / "recipes").as_posix() for path in (ROOT / "recipes").rglob("*.yaml")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy: a build leaves folders behind."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("dsplugins", "recipes", "launch"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    line = [*PIP, "wheel", *OFFLINE, "--wheel-dir", str(out), str(source)]
    subprocess.run(line, check=True, timeout=300)
    (built,) = out.glob("*.whl")
    return built


def test_the_templates_of_packages_are_in_it(wheel):
    assert "dsplugins/report/page.html" in zipfile.ZipFile(wheel).namelist()


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder with the wheel's content."""
    folder = tmp_path_factory.mktemp("site")
    subprocess.run([*PIP, "install", *OFFLINE, "--target", str(folder), str(wheel)], check=True, timeout=300)
    return folder


def dsplugins(installed, cwd, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    line = [sys.executable, "-m", "dsplugins", *arguments]
    done = subprocess.run(line, capture_output=True, text=True, cwd=cwd, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_recipes_are_inside_the_package_and_listed(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    inside = {n.removeprefix("dsplugins/_recipes/") for n in names if n.startswith("dsplugins/_recipes/")}
    assert inside == shipped()
    templates = {Path(n).name for n in names if n.startswith("dsplugins/_launch/")}
    assert templates == {file.name for file in (ROOT / "launch").iterdir() if file.suffix != ".sh"}
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"dsplugins"}


def test_the_command_finds_them_outside_of_a_checkout(installed, tmp_path):
    rows = json.loads(dsplugins(installed, tmp_path, "recipes", "--json"))
    assert {row["recipe"] for row in rows} == shipped() and all(row["about"] for row in rows)


def test_launch_finds_its_templates_there(installed, tmp_path):
    line = ["launch", "deepseek_v3/v3_671b.yaml", "--nodes", "256", "--on", "slurm", "--dry-run"]
    assert "#SBATCH --nodes=256\n" in dsplugins(installed, tmp_path, *line)


def test_a_shipped_recipe_extends_shipped_ones(installed, tmp_path):
    rows = json.loads(dsplugins(installed, tmp_path, "explain", "deepseek_v3/v3_671b.yaml", "--json"))
    origins = {row["key"]: row["origin"] for row in rows}
    assert "_recipes/base.yaml:" in origins["optimizer.adam_eps"]
    assert "_recipes/hardware/h800_2048.yaml:" in origins["run.world_size"]
