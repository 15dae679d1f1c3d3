"""A real run that counts: which steps, what it writes, and that nothing else changes."""

from __future__ import annotations

import contextlib
import io
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

TINY = Path(__file__).parents[2] / "tiny.yaml"
RUN = [
    "parallel.expert=2",
    "train.steps=6",
    "train.micro_batch=2",
    "evaluate.every=2",
    "evaluate.sequences=4",
    "save.at_end=false",
]


def trained(folder: str, overrides: list[str]) -> str:
    """`dsplugins train` on this worker's ranks; what it printed."""
    import torch

    from dsplugins.recipe import Recipe
    from dsplugins.testing import temporary_groups
    from dsplugins.train import train

    world = torch.distributed.get_world_size()
    os.environ |= {"WORLD_SIZE": str(world), "RANK": str(torch.distributed.get_rank())}
    where = [f"run.world_size={world}", f"run.directory={json.dumps(folder)}"]
    with (
        temporary_groups(),
        mock.patch.object(torch.distributed, "destroy_process_group"),  # the worker keeps its own
        contextlib.redirect_stdout(io.StringIO()) as said,
    ):
        train(Recipe.load(TINY, [*RUN, *overrides, *where]))
    return said.getvalue()


def both(folder: str) -> str:
    """With the plugin and without it."""
    trained(f"{folder}/plain", [])
    return trained(f"{folder}/counted", ["plugins.bytes_on_wire={every: 3}"])


@pytest.fixture(scope="module")
def runs(workers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wire")
    said, other = workers(2).run(both, str(folder))
    assert not other
    return folder, said


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


def test_no_number_changes(runs):
    folder, _ = runs
    for key in ("loss", "mtp_loss", "aux_loss", "grad_norm", "max_vio"):
        plain, counted = ([row[key] for row in rows(folder, name)] for name in ("plain", "counted"))
        assert plain == counted, key


def test_the_second_step_then_each_third_but_none_behind_an_evaluation(runs):
    """Steps 2, 3 and 6 are due; after step 2 comes an evaluation, so 4 takes the place of 3."""
    folder, said = runs
    measured = [row for row in rows(folder, "counted") if "wire_bytes" in row]
    assert [row["step"] for row in measured] == [2, 4, 6]
    assert len({row["wire_calls"] for row in measured}) == 1
    assert all(0 < row["wire_bytes"] <= row["wire_bytes_max"] for row in measured)
    assert "mean of steps 2, 4, 6" in said


def test_the_table_says_what_was_predicted_of_everything_that_was_sent(runs):
    folder, said = runs
    table = json.loads((folder / "counted" / "bytes_on_wire.json").read_text())
    assert table["steps"] == [2, 4, 6] and table["ranks"] == 2
    found = {(row["kind"], row["group"]): row for row in table["rows"]}
    assert {("all_to_all", "expert"), ("reduce_scatter", "data"), ("all_reduce", "world")} <= set(found)
    for key, row in found.items():
        assert row["payload"] == row["predicted"] > 0, key
    mean = sum(row["sent"] for row in found.values())
    assert mean == pytest.approx(
        sum(row["wire_bytes"] for row in rows(folder, "counted") if "wire_bytes" in row) / 3
    )
    assert "bytes_on_wire: all_to_all in expert: 48 calls, " in said and "as predicted" in said


def problems(world: int, steps: int) -> list[str]:
    from dsplugins.contracts import Layout
    from dsplugins.plugins.event.bytes_on_wire import BytesOnWire, BytesOnWireOptions

    plan: Any = SimpleNamespace(layout=Layout(world_size=world), train=SimpleNamespace(steps=steps))
    settings: Any = None
    return [p.key for p in BytesOnWire(BytesOnWireOptions()).ds_check(plan=plan, settings=settings)]


def test_what_would_show_nothing_is_refused():
    assert problems(2, 2) == []
    assert problems(1, 2) == ["plugins.bytes_on_wire"]
    assert problems(2, 1) == ["train.steps"]
