"""docs/plugins/slots.md: its package, written to a folder, trains; what it says of numbers holds."""

from __future__ import annotations

import os
import sys
import tomllib
from pathlib import Path

import forks
import pytest
from pages import DOCS, blocks
from runs import SEQUENTIAL

TINY = ["train.steps=2", "evaluate.sequences=8"]
SWAPS = {
    "attention": ["plugins.mla=null", "plugins.plain={}"],
    "experts": ["plugins.grouped=null", "plugins.outside={}"],
    "schedule": ["plugins.one_f_one_b=null", "plugins.all_forward={}"],
    "precision": ["plugins.fp32=null", "plugins.rounded={}"],
}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The page's files, and the metadata that an installation would leave beside them."""
    folder = tmp_path_factory.mktemp("page")
    for block in blocks(DOCS / "plugins" / "slots.md"):
        file = folder / block.file
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(block.text)
    site = folder / "slots"
    project = tomllib.loads((site / "pyproject.toml").read_text())["project"]
    information = site / f"{project['name']}-{project['version']}.dist-info"
    information.mkdir()
    head = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    (information / "METADATA").write_text(head)
    groups = [
        "\n".join([f"[{group}]", *(f"{name} = {value}" for name, value in entries.items())])
        for group, entries in project["entry-points"].items()
    ]
    (information / "entry_points.txt").write_text("\n".join(groups))
    return str(site)


def trained(site, *overrides):
    """Two steps and an evaluation, audited before the first step."""
    import runs

    sys.path.insert(0, site)
    try:
        return runs.trained([*TINY, *overrides])
    finally:
        sys.path.remove(site)


def losses(result):
    return [row["loss"] for row in result["rows"]] + [result["evaluation"]["loss"]]


@pytest.fixture(scope="module")
def stock(workers, site):
    return losses(workers(1).run(trained, site)[0])


@pytest.mark.parametrize(("slot", "apart"), [("experts", 1e-5), ("schedule", 1e-6)])
def test_the_same_numbers_another_way(workers, site, stock, slot, apart):
    (result,) = workers(1).run(trained, site, *SWAPS[slot])
    assert losses(result) == pytest.approx(stock, abs=apart)


def test_rounded_inputs_change_little_but_something(workers, site, stock):
    # The linears of grouped experts are none that it reaches.
    (result,) = workers(1).run(trained, site, *SEQUENTIAL, *SWAPS["precision"])
    assert losses(result) == pytest.approx(stock, abs=0.02)
    assert losses(result) != pytest.approx(stock, abs=1e-6)


def test_an_attention_without_core_attention_is_audited_and_trains_in_any_layout(workers, site, stock):
    (one,) = workers(1).run(trained, site, *SWAPS["attention"])
    for result in workers(2).run(trained, site, *SWAPS["attention"], "parallel.tensor=2"):
        assert losses(result) == pytest.approx(losses(one), abs=1e-5)
    assert losses(one) != pytest.approx(stock, abs=1e-6)


def described(site, *overrides):
    from runs import assembled

    from dsplugins.audit import describe

    sys.path.insert(0, site)
    try:
        with assembled(list(overrides)) as run:
            return [
                (kind.attention, kind.core_attention) for kind in describe(run.settings.model, run.chunks)
            ]
    finally:
        sys.path.remove(site)


def test_what_is_not_there_has_no_name_in_the_table(workers, site):
    (kinds,) = workers(1).run(described, site, *SWAPS["attention"])
    assert set(kinds) == {("PlainAttention", "")}


def test_check_builds_all_four(site, tmp_path):
    tiny = Path(__file__).parents[1] / "tiny.yaml"
    swaps = [word for swap in SWAPS.values() for word in swap]
    environment = {**os.environ, "PYTHONPATH": site}
    done = forks.run(
        [sys.executable, "-m", "dsplugins", "check", str(tiny), *swaps], cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "nothing wrong with the recipe" in done.stdout
    assert "in sequences of 32; the operations of its attention are not known." in done.stdout
    assert "KV cache" not in done.stdout
