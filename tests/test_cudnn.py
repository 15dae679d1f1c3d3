"""cuDNN's attention is refused where it would not run, and another library's cuDNN is told."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from dsplugins import cudnn
from dsplugins.cli import machine

OPTION = "plugins.torch_local.attention"
BUILT = (9, 19, 0)


def said(platform):
    return [
        problem.message for problem in cudnn.attention(OPTION, SimpleNamespace(slots={"platform": platform}))
    ]


def finds(monkeypatch, version, built=BUILT):
    monkeypatch.setattr(cudnn, "_versions", lambda: (version, built))


@pytest.fixture
def hopper(monkeypatch):
    """A Hopper with cuDNN 9.19, as far as this module asks, and no transformer_engine."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    finds(monkeypatch, BUILT)
    find = cudnn.importlib.util.find_spec
    monkeypatch.setattr(
        cudnn.importlib.util, "find_spec", lambda name: find(name) if name == "nvidia" else None
    )


def test_where_it_runs(hopper):
    assert said("cuda") == []
    assert said("cpu") == [f"{OPTION}=cudnn needs CUDA, but the platform is cpu"]


def test_an_older_card_or_library(hopper, monkeypatch):
    finds(monkeypatch, (9, 10, 2), built=(9, 10, 2))
    assert "here are sm_90 and 91002" in said("cuda")[0]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert "here are sm_80" in said("cuda")[0]


def test_another_cudnn_that_transformer_engine_has_loaded(hopper, monkeypatch):
    """Told each time that it is asked, also after an earlier look was right."""
    assert said("cuda") == []
    finds(monkeypatch, (9, 14, 0))
    told = "torch was built with cuDNN 9.19.0, and finds 9.14.0"
    assert said("cuda") == said("cuda") == [f"{OPTION}=cudnn: {told}"]
    assert "LD_LIBRARY_PATH=" in cudnn.remedy() and cudnn.version() == 91400
    row = machine._cudnn()
    assert (row["state"], row["found"]) == ("WRONG", told)
    finds(monkeypatch, (9, 20, 1))
    assert machine._cudnn() == {"what": "cuDNN", "found": "92001", "state": "ok", "remedy": ""}


def test_versions_are_those_of_torch():
    found, built = cudnn._versions()
    assert built in ((0, 0, 0), found) or found[0] == built[0]
    if torch.backends.cudnn.is_available():
        assert cudnn.version() == torch.backends.cudnn.version()


def test_one_that_cannot_be_imported_has_loaded_nothing(hopper, monkeypatch):
    monkeypatch.setattr(cudnn.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    assert cudnn.mismatch() is None
