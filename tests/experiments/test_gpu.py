"""`experiment gpu`: its parts on the CPU platform at tiny sizes, its record, a machine without a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from dsplugins.experiments import gpu as experiment

ROOT = Path(__file__).parents[2]
STEP = ("plugins.cuda=null", "plugins.cpu={}", "data.seq_length=32", "train.micro_batch=2")
STEP += ("train.global_batch=2", "model.hidden_size=32", "model.ffn_hidden_size=32", "model.num_layers=2")
FP8 = ["plugins.bf16=null", "plugins.fp8_v3={}"]
PASS = {"seconds": [0.25], "seconds_median": 0.25}
PATHS = [
    {"path": "math", **PASS, "errors": {"output": 1e-3, "key_gradient": 2e-3}},
    {"path": "flash", "unavailable": "No available kernel"},
]
MEASURED = {
    "step": {
        "dsplugins_seconds_median": 0.1,
        "hand_written_seconds_median": 0.2,
        "ratio_of_medians": 0.5,
        "peak_memory": 2**31,
    },
    "moe_layer": {"tokens": 4096, **PASS, "peak_memory": 3 * 2**30},
    "mla_block": {"failed": "rank 0 was killed by SIGKILL"},
    "attention": {"paths": PATHS},
    "few_experts": {"tokens": 4096, **PASS, "peak_memory": 2**30},
    "products": {
        "rows": [
            {
                "linear": "kv down",
                "product": "wgrad",
                **PASS,
                "tflops": 990.4,
                "ratio_to_bf16": 1.75,
                "ratio_to_peak": 1.23,
                "error": 1e-3,
            }
        ],
        "aim": {"aim": 1.6, "of": 1, "reached": 1, "least": 1.75},
    },
    "casts": {
        "rows": [{"cast": "columns", **PASS, "gb_per_second": 3801.2, "ratio_to_copy": 0.88}],
        "aim": {"aim": 0.8, "of": 1, "reached": 1, "least": 0.88},
    },
}


def all_parts():
    """Every part in this worker, one timed pass each; core's groups are gone afterwards."""
    from gpu.full_width import TINY

    from dsplugins.experiments.gpu_part import PARTS
    from dsplugins.testing import temporary_groups

    os.environ |= {"WORLD_SIZE": "1", "RANK": "0"}
    found = {}
    for part in PARTS:
        changes = experiment.changes(experiment.Way(part, "torch_local"))
        changes += FP8 if part in ("products", "casts") else []
        with temporary_groups():
            found[part] = PARTS[part]([*changes, *(STEP if part == "step" else TINY)], 1)
    return found


def test_every_part_measures_on_the_cpu(workers):
    (found,) = workers(1).run(all_parts)
    assert found.keys() == experiment.PARTS.keys()
    assert len(found["step"]["hand_written_seconds"]) == 1 and found["step"]["ratio_of_medians"] > 0
    for part in ("moe_layer", "mla_block", "few_experts"):
        assert found[part]["tokens"] == 128 and found[part]["seconds_median"] > 0
    experts, shared, gate = 32 * 3 * 64 * 32, 3 * 64 * 32, 32 * 64
    assert found["moe_layer"]["parameters"] == experts + shared + gate
    assert all(max(path["errors"].values()) < 1e-2 for path in found["attention"]["paths"])
    for part, count, ratio in (("products", 3, "ratio_to_bf16"), ("casts", 10, "ratio_to_copy")):
        assert len(found[part]["rows"]) == found[part]["aim"]["of"] == count
        assert min(row[ratio] for row in found[part]["rows"]) == found[part]["aim"]["least"] > 0
    assert {row["error"] for row in found["products"]["rows"]} == {0.0}, "the reference beside itself"
    rows = [{**vars(experiment.Way(part, "torch_local")), **row} for part, row in found.items()]
    record = experiment.results(rows, 1, STEP)
    assert (
        record["holds"]
        and len(experiment.table(json.loads(json.dumps(record)))) == 1 + 2 + 1 + 1 + 5 + 1 + 4 + 11
    )


def row(part, form, backend, seconds):
    return {"part": part, "format": form, "backend": backend, "seconds_median": seconds}


def test_layers_are_compared_with_the_faster_bf16_and_with_te():
    measured = [
        row("mla_block", "bf16", "torch_local", 2.0),
        row("mla_block", "bf16", "te", 1.5),
        row("mla_block", "te_blockwise", "te", 1.0),
        row("mla_block", "fp8_v3 torch", "torch_local", 1.0),
        row("mla_block", "fp8_v3 deepgemm", "torch_local", 1.1),
        row("few_experts", "bf16", "torch_local", 2.0),
        row("few_experts", "fp8_v3 torch", "torch_local", 1.6),
        {"part": "few_experts", "format": "fp8_v3 deepgemm", "backend": "torch_local", "skipped": "none"},
    ]
    found = {(one["part"], one["format"]): one for one in experiment.layers(measured)}
    assert {key: one["reached"] for key, one in found.items()} == {
        ("mla_block", "fp8_v3 torch"): True,
        ("mla_block", "fp8_v3 deepgemm"): False,
        ("few_experts", "fp8_v3 torch"): False,
    }
    assert found["mla_block", "fp8_v3 torch"]["ratio_to_bf16"] == 1.5
    assert found["few_experts", "fp8_v3 torch"]["ratio_to_te_blockwise"] is None


class Autocast:
    """A layer whose linear multiplies in FP8 only inside the layer's context, as TransformerEngine's does."""

    def __init__(self, real, obedient):
        self.real, self.obedient, self.entered = real, obedient, 0

    def get_inner_quantization_context(self):
        import contextlib

        @contextlib.contextmanager
        def context():
            self.entered += 1
            for linear in self.linears:
                linear.fp8 = self.obedient
            yield

        return context()

    @property
    def linears(self):
        return [m for m in self.real.modules() if hasattr(m, "fp8_initialized")]


def timed_in_fp8(obedient):
    from dataclasses import replace

    from gpu.full_width import TINY, built

    from dsplugins.experiments import gpu_layer, gpu_part

    with built(
        [*experiment.changes(experiment.Way("mla_block", "torch_local")), *gpu_layer.FEW, *TINY]
    ) as layer:
        attention = layer.module.self_attention
        attention.linear_proj.fp8_initialized, attention.linear_proj.fp8 = True, False
        outer = Autocast(layer.module, obedient)
        layer.settings.model.fp8 = "e4m3"
        standing = replace(layer, module=outer)
        object.__setattr__(standing, "wrapped", layer.wrapped)
        try:
            gpu_part._module(standing, attention, 1, None)
        except RuntimeError as error:
            return outer.entered, str(error)
        return outer.entered, None


def test_te_is_timed_inside_its_autocast_or_not_at_all(workers):
    """Core enters it around whole layers, which a part that is called by itself would miss."""
    assert workers(1).run(timed_in_fp8, True) == [(1 + 3 + 1, None)]
    assert workers(1).run(timed_in_fp8, False) == [(1, "model.fp8=e4m3, but in BF16: linear_proj")]


def test_each_part_is_on_cuda_with_its_backend():
    from dsplugins.experiments.gpu_layer import ALONE
    from dsplugins.plan import prepare
    from dsplugins.recipe import Recipe

    for way in experiment.ways():
        recipe, more = (experiment.STEP, ()) if way.part == "step" else (experiment.LAYER, ALONE)
        _, plan = prepare(Recipe.load(recipe, [*more, *experiment.changes(way)]))
        assert (plan.slots["platform"], plan.slots["backend"]) == ("cuda", way.backend)
        assert plan.slots["precision"] == way.format.split()[0]
        assert plan.layout.world_size == 1
    assert len(list(experiment.ways())) == len(set(experiment.ways())) == 24


def test_what_a_machine_lacks_is_said(monkeypatch):
    import torch

    small = SimpleNamespace(total_memory=24 * 2**30)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: find(name, *more) if name == "megatron" else None
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: small)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr("dsplugins.cudnn._versions", lambda: ((9, 19, 0), (9, 19, 0)))
    said = {str(way): experiment.lacking(way) for way in experiment.ways()}
    assert said.pop("moe_layer, torch_local") == "needs 100 GiB of GPU memory, this one has 24"
    for name, reason in said.items():
        assert (reason is None) == name.endswith("torch_local"), name
        assert "fp8_v3" not in name or "needs triton" in reason
    skipped = experiment.measure(experiment.Way("step", "te"), (), 1, Path())
    assert skipped["skipped"] == "transformer_engine is not installed"


@pytest.fixture
def measured(monkeypatch):
    """Parts that are not run: these numbers with torch_local, and no library for te."""

    def measure(way, overrides, rounds, folder):
        row = {"skipped": "no library"} if way.backend == "te" else MEASURED[way.part]
        return {**vars(way), **row}

    monkeypatch.setattr(experiment, "measure", measure)


def test_the_command_records_what_failed_and_ends_with_1(measured, tmp_path):
    from dsplugins.cli.gpu import gpu

    line = ["plugins.cuda=null", "plugins.cpu={}", "--rounds", "1", "--out", str(tmp_path)]
    done = CliRunner().invoke(gpu, line)
    assert done.exit_code == 1, done.output
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert not record["results"]["holds"] and len(record["results"]["measured"]) == 24
    assert "torch" in record["versions"] and "gpus" in record["hardware"]
    assert "--rounds 1" in record["command"] and "plugins.cuda=null" in record["command"]
    for told in (
        "990 TFLOP/s, 1.23 of BF16's peak",
        "3801 GB/s",
        "at least 1.6: 1 of 1",
        "100.000",
        "0.500",
        "3.00",
        "math, error 2.0e-03",
        "flash: unavailable",
        "SIGKILL",
    ):
        assert told in done.output, told


def test_parts_alone_and_what_is_left_when_it_is_stopped(measured, tmp_path, monkeypatch):
    from dsplugins.cli.gpu import gpu

    line = ["plugins.cuda=null", "plugins.cpu={}", "--out", str(tmp_path), "--part", "casts"]
    done = CliRunner().invoke(gpu, [*line, "--part", "step"])
    assert done.exit_code == 0 and "step, te: 0 s\n  skipped: no library" in done.output
    record = json.loads((tmp_path / "gpu_step_casts.json").read_text())
    assert [row["part"] for row in record["results"]["measured"]] == ["step", "step", "casts"]
    assert record["results"]["left"] == [] and "--part step --part casts" in record["command"]

    def stopped(way, overrides, rounds, folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment, "measure", chosen(experiment.measure, stopped, at="step, te"))
    assert CliRunner().invoke(gpu, [*line, "--part", "step"]).exit_code != 0
    found = json.loads((tmp_path / "gpu_step_casts.json").read_text())["results"]
    assert not found["holds"] and found["left"] == ["step, te", "casts, torch_local, fp8_v3 torch"]


def chosen(first, second, at):
    """`second` for the way of this name, else `first`."""
    return lambda way, *more: (second if str(way) == at else first)(way, *more)


def test_numbers_of_another_kind_are_not_taken(measured, tmp_path):
    from dsplugins.cli.gpu import gpu

    line = ["plugins.cuda=null", "plugins.cpu={}", "--part", "casts", "--out", str(tmp_path / "records")]
    line += ["--kept", str(tmp_path / "kept")]
    assert CliRunner().invoke(gpu, line).exit_code == CliRunner().invoke(gpu, line).exit_code == 0
    done = CliRunner().invoke(gpu, [*line, "--rounds", "3"])
    assert done.exit_code == 2 and "holds numbers of another rounds: name another folder" in done.output
    (tmp_path / "kept" / "asked.json").unlink()
    (tmp_path / "kept" / "casts.json").write_text("{}")
    done = CliRunner().invoke(gpu, line)
    assert done.exit_code == 2 and "hardware and versions and code" in done.output


def test_what_was_kept_is_not_measured_again(tmp_path):
    way = experiment.Way("step", "torch_local")
    (tmp_path / f"{way}.json").write_text('{"rounds": 7}')
    assert experiment.measure(way, (), 1, tmp_path) == {**vars(way), "rounds": 7}


def test_without_a_gpu_the_environment_is_unfit(measured, tmp_path):
    from dsplugins.cli.gpu import gpu
    from dsplugins.contracts import EnvironmentUnfit

    done = CliRunner().invoke(gpu, ["--out", str(tmp_path)])
    assert isinstance(done.exception, EnvironmentUnfit) and "torch sees 0" in str(done.exception)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="this machine has a GPU")
def test_without_a_gpu_the_script_says_so_in_one_line():
    done = subprocess.run(["bash", ROOT / "launch" / "gpu.sh"], capture_output=True, text=True, timeout=30)
    assert done.returncode == 4 and not done.stdout
    (said,) = done.stderr.splitlines()
    assert "no NVIDIA GPU" in said
