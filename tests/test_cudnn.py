"""cuDNN's attention is refused where it would not run, and another library's cuDNN is told."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from dsplugins import cudnn
from dsplugins.cli import machine

OPTION = "plugins.torch_local.attention"
TOLD = (
    "cuDNN version incompatibility: PyTorch was compiled  against (9, 19, 0) but found runtime version "
    "(9, 14, 0). PyTorch already comes bundled with cuDNN. One option"
)


def said(platform):
    return [
        problem.message for problem in cudnn.attention(OPTION, SimpleNamespace(slots={"platform": platform}))
    ]


@pytest.fixture
def hopper(monkeypatch):
    """A Hopper with cuDNN 9.19, as far as this module asks, and no transformer_engine."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    find = cudnn.importlib.util.find_spec
    monkeypatch.setattr(
        cudnn.importlib.util, "find_spec", lambda name: find(name) if name == "nvidia" else None
    )


def test_where_it_runs(hopper):
    assert said("cuda") == []
    assert said("cpu") == [f"{OPTION}=cudnn needs CUDA, but the platform is cpu"]


def test_an_older_card_or_library(hopper, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    assert "here are sm_90 and 91002" in said("cuda")[0]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert "here are sm_80" in said("cuda")[0]


def test_another_cudnn_that_transformer_engine_has_loaded(hopper, monkeypatch):
    def refuse():
        raise RuntimeError(TOLD)

    monkeypatch.setattr(torch.backends.cudnn, "version", refuse)
    (message,) = said("cuda")
    assert message.endswith("found runtime version (9, 14, 0)") and "LD_LIBRARY_PATH=" in cudnn.remedy()
    row = machine._cudnn(torch)
    assert row["state"] == "WRONG" and "(9, 14, 0)" in row["found"]


def test_one_that_cannot_be_imported_has_loaded_nothing(hopper, monkeypatch):
    monkeypatch.setattr(cudnn.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    assert cudnn.mismatch() is None
