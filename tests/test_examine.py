"""`dsplugins evaluate RUN`: the numbers that the run ended with, from its checkpoint, in any layout."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import forks
import pytest
from click.testing import CliRunner

from dsplugins.cli.evaluate import command

TINY = Path(__file__).parent / "tiny.yaml"
EVERY = ["evaluate.every=2", "save.every=3", "save.keep=3"]


def loaded(file, directory, overrides):
    import os

    import torch

    from dsplugins.recipe import Recipe

    world = torch.distributed.get_world_size()
    os.environ |= {"WORLD_SIZE": str(world), "RANK": str(torch.distributed.get_rank())}
    return Recipe.load(file, [*overrides, f"run.world_size={world}", f"run.directory={directory}"])


def without_leaving(work, *arguments):
    """A worker keeps its process group."""
    from unittest import mock

    import torch

    from dsplugins.testing import temporary_groups

    with temporary_groups(), mock.patch.object(torch.distributed, "destroy_process_group"):
        return work(*arguments)


def train_here(directory, overrides):
    from dsplugins.train import train

    without_leaving(train, loaded(TINY, directory, overrides))


def examine_here(directory, overrides, step=None):
    from dsplugins.examine import examine

    recipe = loaded(Path(directory) / "recipe.resolved.yaml", directory, overrides)
    return without_leaving(examine, recipe, Path(directory), step)


def held_to_look(overrides):
    """Bytes of tensors beside the model's own, and whether the audit finds another MTP than was chosen."""
    import gc
    import os

    import torch

    from dsplugins import audit
    from dsplugins.assemble import assemble_forward
    from dsplugins.plan import prepare
    from dsplugins.recipe import Recipe
    from dsplugins.testing import temporary_groups

    os.environ |= {"WORLD_SIZE": "1", "RANK": "0"}
    recipe = Recipe.load(str(TINY), [*overrides, "run.directory=unused"])
    plugins, plan = prepare(recipe)
    gc.collect()
    before = {id(thing) for thing in gc.get_objects() if torch.is_tensor(thing)}
    with temporary_groups():
        platform = plugins.slot("platform", plan=plan)
        run = assemble_forward(recipe, plan, plugins, platform, platform.prepare(0))
        mine = {t.data_ptr() for chunk in run.chunks for t in (*chunk.parameters(), *chunk.buffers())}
        weights = sum(p.nbytes for chunk in run.chunks for p in chunk.parameters())
        new = (thing for thing in gc.get_objects() if torch.is_tensor(thing) and id(thing) not in before)
        others = sum({t.data_ptr(): t.nbytes for t in new if t.data_ptr() not in mine}.values())
        wrapped = any(
            hasattr(chunk, "buffers_by_dtype") or hasattr(chunk, "ddp_config") for chunk in run.chunks
        )
        run.settings.model.mtp_num_layers = 2
        try:
            audit.audit_forward(run)
        except audit.AuditFailure as failure:
            return weights, others, wrapped, str(failure)
    return weights, others, wrapped, ""


def test_looking_takes_no_memory_for_training(workers):
    ((weights, others, wrapped, said),) = workers(1).run(
        held_to_look, ["plugins.fp32=null", "plugins.bf16={}"]
    )
    assert not wrapped and others < weights / 4, (others, weights)
    assert "mtp.1 stands 0 times in the pipeline" in said, "it is audited all the same"


@pytest.fixture(scope="module")
def run(workers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    workers(2).run(train_here, str(folder), ["parallel.expert=2", *EVERY])
    return folder


def evaluations(run):
    return [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]


def test_every_evaluation_of_a_run_is_kept(run):
    rows = evaluations(run)
    assert [row["step"] for row in rows] == [2, 4, 5]
    assert rows[-1] == json.loads((run / "run.json").read_text())["evaluation"]


def test_the_same_layout_gives_the_same_numbers(run, workers):
    first, second = workers(2).run(examine_here, str(run), ["parallel.expert=2"])
    there = evaluations(run)[-1]
    mine = json.loads(json.dumps(first))
    assert {key: mine[key] for key in there} == there
    assert first == second and first["differences"] == [] and first["damaged"] == []
    assert first["checkpoint"].endswith("step-00000005")


LAYOUTS = {
    "one process": (1, ["parallel.expert=1"]),
    "tensor": (2, ["parallel.expert=1", "parallel.tensor=2"]),
    "pipeline": (2, ["parallel.expert=1", "parallel.pipeline=2"]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_another_layout_gives_the_same_numbers_up_to_rounding(run, workers, name):
    size, layout = LAYOUTS[name]
    found = workers(size).run(examine_here, str(run), layout)[0]
    there = evaluations(run)[-1]
    assert math.isclose(found["loss"], there["loss"], rel_tol=1e-6)
    assert math.isclose(found["mtp_loss"], there["mtp_loss"], rel_tol=1e-6)
    assert {k: list(v) for k, v in found["expert_load"].items()} == there["expert_load"]
    assert any("parallel.expert: 2 -> 1" in difference for difference in found["differences"])


def test_the_load_is_every_token_in_every_layer(run):
    row = evaluations(run)[-1]
    assert list(row["expert_load"]) == ["decoder.1", "decoder.2", "decoder.3", "mtp.0"]
    for counts in row["expert_load"].values():
        assert sum(counts) == row["sequences"] * 32 * 2  # S tokens, K experts each


def test_bits_per_byte_are_the_loss_over_the_text(run, workers):
    row = evaluations(run)[-1]
    facts = (run / "built.json").read_text()
    tokens, size = (
        int(facts.partition(f"validation_{what} ")[2].split(",")[0].split('"')[0])
        for what in ("tokens", "bytes")
    )
    assert math.isclose(row["bits_per_byte"], row["loss"] / math.log(2) * tokens / size)
    assert row["bits_per_byte"] > row["loss"] / math.log(2)  # a document's end is a token without a byte


def test_an_earlier_checkpoint_can_be_asked_for(run, workers):
    found = workers(2).run(examine_here, str(run), ["parallel.expert=2"], 3)[0]
    assert found["step"] == 3 and found["checkpoint"].endswith("step-00000003")
    assert found["loss"] > evaluations(run)[-1]["loss"]


def test_the_command_prints_json_and_leaves_the_run_alone(run):
    before = {file: file.stat().st_mtime_ns for file in run.rglob("*") if file.is_file()}
    line = [sys.executable, "-m", "dsplugins", "evaluate", str(run), "--json"]
    line += ["run.world_size=1", "parallel.expert=1"]
    done = forks.run(line)
    assert done.returncode == 0 and done.stderr.startswith("starting 1 process: ")
    assert done.stderr.count("\n") == 1
    assert math.isclose(json.loads(done.stdout)["loss"], evaluations(run)[-1]["loss"], rel_tol=1e-6)
    assert before == {file: file.stat().st_mtime_ns for file in run.rglob("*") if file.is_file()}


def test_what_is_not_there_is_said(run, workers, tmp_path):
    nothing = CliRunner().invoke(command, [str(tmp_path)])
    assert nothing.exit_code == 2 and "holds no run" in nothing.output
    unseen = CliRunner().invoke(command, [str(run), "evaluate.sequences=0"])
    assert [problem.remedy for problem in unseen.exception.problems] == [
        "give evaluate.sequences=64 on the command line"
    ]
    with pytest.raises(Exception, match="no checkpoint of step 4 that is whole .steps: 5, 3."):
        workers(2).run(examine_here, str(run), ["parallel.expert=2"], 4)
