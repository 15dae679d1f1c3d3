"""NVIDIA's apex itself on a GPU: its norm against exact numbers, each option in a run, and its mere presence.

What stands in for it elsewhere (tests/nvidia) has its interface; here are its kernels.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from gpu.short_runs import (
    LOOSE,
    PRECISIONS,
    RECIPE,
    SHORT,
    TIGHT,
    apart,
    numbers,
    stopped_and_resumed,
    train_on,
)

from dsplugins import apex

OPTIONS = {
    "norm": ("plugins.torch_local.norm=apex", "fused_layer_norm_cuda", "rms_forward_affine"),
    "adamw": ("plugins.adamw.kernel=apex", "amp_C", "multi_tensor_adam"),
    "weight gradient": (
        "plugins.torch_local.fused_weight_gradient=true",
        "fused_weight_gradient_mlp_cuda",
        "wgrad_gemm_accum_fp32",
    ),
}
"""What is chosen -> override, apex's extension, and the function of it that must be called."""
PLAIN = "plugins.adamw.moments=fp32"
"""apex's kernel has no other."""
KERNELS = ("amp_C", "fused_layer_norm_cuda", "fused_weight_gradient_mlp_cuda")
ALONE = """
import json, os
from hidden import hide
if {hide}:
    hide("apex", *{kernels})
os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
import torch, torch.distributed as dist
torch.cuda.set_device(0)
torch.use_deterministic_algorithms(True, warn_only=True)
dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
from dsplugins import apex
assert bool(apex.nvidias()) is not {hide}
from gpu.short_runs import SHORT, numbers, train_on
print("numbers", json.dumps(numbers(train_on(SHORT)["rows"])))
dist.destroy_process_group()
"""
pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def installed():
    if not apex.nvidias():
        pytest.skip("NVIDIA's apex is not installed here")


@pytest.fixture
def calls(monkeypatch):
    """How often the functions of apex's extensions are called: {name: number}."""
    counted = {}

    def counting(name, function):
        def call(*given, **named):
            counted[name] = counted.get(name, 0) + 1
            return function(*given, **named)

        return call

    for _, module, name in OPTIONS.values():
        kernels = importlib.import_module(module)
        monkeypatch.setattr(kernels, name, counting(name, getattr(kernels, name)))
    return counted


@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_norms_are_as_exact_as_torchs(nccl, kind, dtype):
    """V3's width, forward and backward against float64: at most twice as far away as torch's norm is."""
    import torch
    from megatron.core.transformer import TransformerConfig

    from dsplugins.plugins.backend.apex_norm import ApexNorm
    from dsplugins.plugins.backend.norm import Norm

    half = dtype == "bfloat16"
    config = TransformerConfig(
        num_layers=1, hidden_size=7168, num_attention_heads=2, normalization=kind, bf16=half,
        params_dtype=getattr(torch, dtype),
    )  # fmt: skip
    x, dy = (torch.randn(512, 7168, device=nccl).to(config.params_dtype) for _ in range(2))
    found = []
    for make in (ApexNorm, Norm):
        norm = make(config, 7168, 1e-6).to(nccl)
        exact = getattr(torch.nn, kind)(7168, eps=1e-6, dtype=torch.float64, device=nccl)
        found.append(distances(norm, exact, x, dy))
    assert all(mine <= 2 * torchs + 1e-9 for mine, torchs in zip(*found, strict=True)), found


def distances(norm, exact, x, dy):
    """Of output and gradients, relative to their size."""
    results = []
    for module, given, gradient in ((norm, x, dy), (exact, x.double(), dy.double())):
        leaf = given.detach().clone().requires_grad_()
        y = module(leaf)
        y.backward(gradient)
        results.append([y.detach(), leaf.grad, module.weight.grad])
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(*results, strict=True)]


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_run_with_its_kernels(nccl, calls, option, precision):
    """Losses are those of a run without; the kernel that was asked for has been called, and no other."""
    override, _, kernel = OPTIONS[option]
    line = (*SHORT, *PRECISIONS[precision], PLAIN)
    plain = train_on(line)
    assert calls == {}
    mine = train_on((*line, override))
    assert list(calls) == [kernel]
    assert not apart(mine["rows"], plain["rows"], TIGHT if precision == "fp32" else LOOSE)


def test_a_stopped_run_goes_on_bit_for_bit(nccl, deterministic, calls, tmp_path):
    """With all three at once."""
    line = (*SHORT, PLAIN, *(override for override, _, _ in OPTIONS.values()))
    whole, again = stopped_and_resumed(line, RECIPE, tmp_path)
    assert numbers(whole)[2:] == numbers(again)
    assert len(calls) == len(OPTIONS)


def test_its_presence_decides_nothing():
    """A recipe that does not name it: the same bits with it and where it can't be imported."""
    here = Path(__file__).parent
    said = []
    for hide in (False, True):
        path = os.pathsep.join([str(here), str(here.parent), *sys.path])
        done = subprocess.run(
            [sys.executable, "-c", ALONE.format(kernels=KERNELS, hide=hide)],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        assert done.returncode == 0, done.stderr
        said.append([line for line in done.stdout.splitlines() if line.startswith("numbers ")])
    assert said[0] == said[1] and len(said[0]) == 1
