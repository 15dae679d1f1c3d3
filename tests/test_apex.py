"""NVIDIA's apex is taken where an option says so and nowhere else; a package of the same name is not it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from runs import SEQUENTIAL

HERE = Path(__file__).parent
NVIDIA = HERE / "nvidia"
CUDA = SimpleNamespace(slots={"platform": "cuda"})


@pytest.fixture
def nvidias(monkeypatch):
    """A stand-in with NVIDIA's interface, forgotten afterwards."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(NVIDIA))
    yield
    for name in set(sys.modules) - before:
        if name.split(".")[0] == "apex" or ".apex_" in name:
            del sys.modules[name]


def found(key="plugins.adamw.kernel", plan=CUDA, extension="amp_C"):
    from dsplugins import apex

    return [problem.message for problem in apex.chosen(key, plan, extension)]


def test_what_is_missing_is_told(monkeypatch, tmp_path, nvidias):
    assert found() == []
    assert found(plan=SimpleNamespace(slots={"platform": "cpu"})) == [
        "plugins.adamw.kernel needs CUDA, but the platform is cpu"
    ]
    assert found(extension="not_built") == [
        "plugins.adamw.kernel needs apex's CUDA extension not_built, which isn't built here"
    ]


def test_another_package_of_that_name_is_not_it(monkeypatch, tmp_path):
    assert found() == ["plugins.adamw.kernel needs NVIDIA's apex, which isn't installed here"]
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise RuntimeError('never imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert found() == [
        "plugins.adamw.kernel needs NVIDIA's apex, which isn't the `apex` that is installed here"
    ]


def test_kernels_that_do_not_load_are_told(monkeypatch, tmp_path, nvidias):
    """Whoever asks for what: megatron-core takes apex's optimizer for its own where it finds it."""
    from dsplugins import apex

    assert not list(apex.unusable("plugins.adamw"))
    (tmp_path / "amp_C.py").write_text("raise ImportError('undefined symbol: of another torch')")
    monkeypatch.delitem(sys.modules, "amp_C", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    (told,) = apex.unusable("plugins.adamw")
    assert (told.kind, told.key) == ("environment", "plugins.adamw")
    assert told.message.endswith("can't be loaded: undefined symbol: of another torch")
    monkeypatch.syspath_prepend(str(HERE / "transformer_engine_there"))
    assert not list(apex.unusable("plugins.adamw"))  # core takes that


def test_what_was_chosen_and_does_not_load_is_told(monkeypatch, tmp_path, nvidias):
    """Also where transformer-engine is there, which core would take."""
    (tmp_path / "broken.py").write_text("raise ImportError('undefined symbol: of another torch')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(HERE / "transformer_engine_there"))
    assert found(extension="broken") == [
        "plugins.adamw.kernel needs apex's CUDA extension broken, which can't be loaded: "
        "undefined symbol: of another torch"
    ]


HIDING = """
from hidden import hide
from dsplugins import apex
assert apex.nvidias()
hide("apex", "amp_C")
from dsplugins.plan import prepare
from dsplugins.recipe import Recipe
plugins, plan = prepare(Recipe.load("deepseek_v3/tiny_gpu.yaml"))
assert apex.nvidias() is None and plan.slots["optimizer"] == "adamw"
import megatron.core.optimizer, torch
assert megatron.core.optimizer.Adam is torch.optim.AdamW
"""


def test_apex_can_be_hidden_from_a_process():
    """As its test on a GPU does (tests/gpu/test_apex.py): everything else is found."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(NVIDIA), str(HERE), *sys.path])}
    done = subprocess.run([sys.executable, "-c", HIDING], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def test_options_are_checked_where_they_stand(nvidias):
    from dsplugins.plugins.backend.torch_local import TorchLocal, TorchLocalOptions

    plain, chosen = TorchLocal(), TorchLocal(TorchLocalOptions(norm="apex", fused_weight_gradient=True))
    field = "model.gradient_accumulation_fusion"
    assert plain.ds_settings(CUDA)[field] is False and chosen.ds_settings(CUDA)[field] is True
    assert chosen.stand_in == "torch_local" and not hasattr(plain, "stand_in")
    assert [option for option, _ in chosen._of_apex()] == ["norm", "fused_weight_gradient"]


@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
def test_norms_are_apexs_with_our_marks(single, nvidias, kind):
    import torch
    from megatron.core.transformer import TransformerConfig

    from dsplugins.plugins.backend.norm import Norm
    from dsplugins.plugins.backend.torch_local import TorchLocal, TorchLocalOptions

    config = TransformerConfig(
        num_layers=1,
        hidden_size=24,
        num_attention_heads=2,
        normalization=kind,
        params_dtype=torch.bfloat16,
        bf16=True,
    )
    made = TorchLocal(TorchLocalOptions(norm="apex")).ds_backend(config).layer_norm()(config, 24, 1e-6)
    import apex.normalization

    assert isinstance(made, getattr(apex.normalization, f"Fused{kind}"))
    assert all(p.dtype == torch.bfloat16 and p.sequence_parallel is False for p in made.parameters())
    x = torch.randn(5, 24).bfloat16()
    assert torch.equal(made(x), Norm(config, 24, 1e-6)(x))


def test_weight_gradients_are_added_in_the_product(single, nvidias, monkeypatch):
    """Core's linear hands its buffer to apex's kernel; the sum is that of the plain one."""
    import fused_weight_gradient_mlp_cuda as kernel
    import torch
    from megatron.core.tensor_parallel import layers
    from megatron.core.transformer import TransformerConfig

    monkeypatch.setattr(layers, "_grad_accum_fusion_available", True)
    monkeypatch.setattr(layers, "fused_weight_gradient_mlp_cuda", kernel, raising=False)
    gradients = []
    for fused in (False, True):
        config = TransformerConfig(
            num_layers=1,
            hidden_size=8,
            num_attention_heads=2,
            gradient_accumulation_fusion=fused,
            use_cpu_initialization=True,
        )
        torch.manual_seed(0)
        linear = layers.ColumnParallelLinear(
            8, 6, config=config, init_method=torch.nn.init.normal_, bias=False
        )
        linear.weight.main_grad = torch.ones(6, 8)
        linear.weight.grad_added_to_main_grad = False
        linear(torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(1)))[0].square().sum().backward()
        gradients.append(linear.weight.main_grad if fused else 1 + linear.weight.grad)
    assert torch.allclose(*gradients, rtol=1e-6)


BF16 = ["plugins.fp32=null", "plugins.bf16={}", "plugins.adamw.moments=bf16"]
RUNS = (
    ["train.steps=2"],
    ["train.steps=2", *BF16, "plugins.v3_recompute={}"],
    ["train.steps=2", *SEQUENTIAL, "plugins.adamw.zero=false"],
)
LINE = """
import torch.distributed as dist
from dsplugins.testing import world
from test_apex import numbers
world.prepare_cpu()
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
print("numbers", numbers())
"""


def numbers():
    """Losses and norms of RUNS in this process."""
    from runs import trained

    return [[(row["loss"], row["grad_norm"]) for row in trained(each)["rows"]] for each in RUNS]


def numbers_with(path):
    """The same in a process that may import what lies in `path`."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(path), str(HERE), *sys.path])}
    done = subprocess.run([sys.executable, "-c", LINE], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    (said,) = (line for line in done.stdout.splitlines() if line.startswith("numbers "))
    return said


def test_presence_decides_nothing(workers):
    """With NVIDIA's apex, with TransformerEngine and without: the same bits, and none of their kernels."""
    (alone,) = workers(1).run(numbers)
    assert len(alone) == len(RUNS)
    assert numbers_with(NVIDIA) == f"numbers {alone}"
    assert numbers_with(HERE / "transformer_engine_there") == f"numbers {alone}"
