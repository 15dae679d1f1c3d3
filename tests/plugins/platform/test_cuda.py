"""The CUDA platform says what is missing, and takes the device where it is there."""

import pytest

from dsplugins.contracts import EnvironmentUnfit
from dsplugins.plugins.platform.cuda import Cuda


@pytest.fixture
def without_gpu(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_missing_devices_are_an_environment_problem(without_gpu):
    (problem,) = Cuda().ds_platform(plan=None).problems(8)
    assert problem.kind == "environment"
    assert "needs 8 GPUs" in problem.message and problem.remedy and problem.key == "plugins.cuda"


def test_prepare_refuses_without_a_device(without_gpu):
    with pytest.raises(EnvironmentUnfit, match="torch sees 0"):
        Cuda().ds_platform(plan=None).prepare(0)


def test_too_few_devices(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    platform = Cuda().ds_platform(plan=None)
    assert not list(platform.problems(4))
    assert "torch sees 4" in next(iter(platform.problems(8))).message


@pytest.mark.gpu
def test_prepare_takes_the_device():
    import torch

    platform = Cuda().ds_platform(plan=None)
    assert platform.prepare(0) == torch.device("cuda", 0)
    torch.ones(2**20, device="cuda")
    platform.synchronize()
    assert platform.peak_memory() >= 2**22
