"""What a backend lacks is said before a run, once each, with what to do."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from dsplugins.contracts import Layout
from dsplugins.plugins.precision.fp8 import needs
from dsplugins.plugins.precision.fp8_v3 import Fp8V3Options

V3 = SimpleNamespace(
    hidden_size=7168, ffn_hidden_size=18432, moe_ffn_hidden_size=2048, num_moe_experts=256,
    moe_shared_expert_intermediate_size=2048, num_attention_heads=128, q_lora_rank=1536, kv_lora_rank=512,
    qk_head_dim=128, qk_pos_emb_head_dim=64, v_head_dim=128,
)  # fmt: skip
TORCH = Fp8V3Options(backend="torch")


def of_recipe(options=TORCH, layout=None, platform="cuda", attention="mla", **changed):
    plan = SimpleNamespace(layout=layout or Layout(), slots={"platform": platform, "attention": attention})
    settings = SimpleNamespace(model=SimpleNamespace(**{**vars(V3), **changed}))
    return [problem.message for problem in needs.of_recipe(options, plan, settings)]


def test_v3_fits():
    for backend in ("torch", "deepgemm"):
        assert of_recipe(Fp8V3Options(backend=backend), Layout(world_size=64, expert=64)) == []


@pytest.mark.parametrize(
    "case, said",
    [
        ({"platform": "cpu"}, "fp8_v3's backend torch needs CUDA, but the platform is cpu"),
        ({"hidden_size": 7176}, "takes widths of multiples of 16, but model.hidden_size is 7176"),
        ({"q_lora_rank": 8}, "takes widths of multiples of 16, but model.q_lora_rank is 8"),
        ({"moe_ffn_hidden_size": 40, "layout": Layout(4, expert_tensor=2)},
         "takes widths of multiples of 16, but a rank's model.moe_ffn_hidden_size is 20"),
        ({"qk_pos_emb_head_dim": 8, "num_attention_heads": 2},
         "but model.kv_lora_rank + model.qk_pos_emb_head_dim is 520"),
        ({"options": Fp8V3Options(backend="deepgemm", outside="fp32")}, "DeepGEMM's products come in BF16"),
        ({"attention": "gqa", "num_attention_heads": 2, "num_query_groups": 1, "kv_channels": 12},
         "but a rank's heads x model.kv_channels is 24"),
        ({"options": replace(TORCH, products=("fprop",))}, "FP8 only, but products leaves some out"),
        ({"options": replace(TORCH, products=("fprop", "fprop", "dgrad"))}, "products leaves some out"),
    ],
)  # fmt: skip
def test_of_a_recipe(case, said):
    (message,) = of_recipe(**case)
    assert said in message


def of_machine(backend):
    found = list(needs.of_machine(backend))
    assert all(problem.kind == "environment" and problem.remedy for problem in found)
    return [problem.message for problem in found]


@pytest.fixture
def gpu(monkeypatch):
    """A machine with Hopper and a torch for CUDA 13, as far as this module asks."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(
        needs.importlib.util, "find_spec", lambda name: SimpleNamespace(submodule_search_locations=None)
    )


def test_hopper_lacks_nothing(gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "deep_gemm", SimpleNamespace(**dict.fromkeys(needs.DEEP_GEMM, print)))
    assert of_machine("torch") == of_machine("deepgemm") == []


def test_another_gpu_an_older_cuda_no_library(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))
    assert of_machine("torch") == ["fp8_v3's backend torch multiplies on Hopper (sm_90), this GPU is sm_100"]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    for cuda, told in (("12.8", "this one has 12.8"), (None, "this one has None"), ("12.9", "")):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        assert [told in message for message in of_machine("torch")] == [True] * bool(told)
    monkeypatch.setattr(needs.importlib.util, "find_spec", lambda name: None)
    triton, deep_gemm = of_machine("deepgemm")
    assert "needs triton" in triton and "needs DeepGEMM" in deep_gemm


def test_another_package_of_that_name(gpu, monkeypatch):
    """The index has one; and the first releases lack what is for all experts."""
    monkeypatch.setitem(sys.modules, "deep_gemm", SimpleNamespace(fp8_gemm_nt=print))
    (message,) = of_machine("deepgemm")
    assert message.startswith("this deep_gemm has no m_grouped_fp8_gemm_nt_contiguous")


@pytest.mark.parametrize(
    ("told", "as_what"),
    [
        ("/x/_C.so: undefined symbol: _ZN3c104cuda19CUDAErrorLogCaptureC1Ev", "was built for another torch"),
        ("libnvrtc.so.13: cannot open shared object file: No such file", "can't be loaded"),
    ],
)
def test_a_library_for_another_torch(gpu, monkeypatch, tmp_path, told, as_what):
    """Found before it is imported, where its loader would go on and read nonsense."""
    (tmp_path / "__init__.py").write_text("raise AssertionError('imported')")
    (tmp_path / "_C.so").touch()
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(needs.importlib.util, "find_spec", lambda name: spec)

    def refuse(library, mode):
        assert library == str(tmp_path / "_C.so") and mode == os.RTLD_NOW
        raise OSError(told)

    monkeypatch.setattr(needs.ctypes, "CDLL", refuse)
    assert of_machine("deepgemm") == [f"this deep_gemm {as_what}: {told}"]


def test_what_is_no_library_is_told(gpu, monkeypatch, tmp_path):
    (tmp_path / "_C.so").write_bytes(b"no library")
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(needs.importlib.util, "find_spec", lambda name: spec)
    (message,) = of_machine("deepgemm")
    assert message.startswith("this deep_gemm can't be loaded: ") and "_C.so" in message


def test_a_library_that_does_not_load(gpu, monkeypatch, tmp_path):
    (tmp_path / "deep_gemm.py").write_text("raise OSError('libnvrtc.so.12: no such file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "deep_gemm", raising=False)
    (message,) = of_machine("deepgemm")
    assert message == "deep_gemm can't be imported: OSError: libnvrtc.so.12: no such file"


def test_linears_are_built_without_the_library(monkeypatch):
    """As `check` does where nothing of the backend is installed; and models are copied and pickled."""
    import copy
    import pickle

    from dsplugins.plugins.precision.fp8.rule import Choice, rule_for

    monkeypatch.setitem(sys.modules, "deep_gemm", None)
    rule = rule_for("fc1", False, Choice(backend="deepgemm"))
    for one in (rule, copy.deepcopy(rule), pickle.loads(pickle.dumps(rule))):
        with pytest.raises(ImportError):
            one.arithmetic.rows(torch.zeros(1, 128), False)
