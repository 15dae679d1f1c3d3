"""The CPU platform: its facts, and that its settings are megatron-core's fields."""

from dataclasses import fields
from types import SimpleNamespace

from dsplugins.plugins.platform.cpu import Cpu, CpuPlatform


def grow(megabytes):
    import torch

    platform = CpuPlatform()
    before = platform.peak_memory()
    # Beyond the mark that earlier jobs of this process have set.
    torch.ones((before + megabytes * 2**20) // 4)
    return before, platform.peak_memory()


def test_peak_memory_is_in_bytes(workers):
    for before, after in workers(2).run(grow, 512):
        assert after - before > 256 * 2**20
        assert after < 2**37


def test_platform_is_gloo_on_cpu(single):
    platform = Cpu().ds_platform(plan=SimpleNamespace())
    assert (platform.device_type, platform.distributed_backend) == ("cpu", "gloo")
    assert platform.prepare(0) == single
    assert not list(platform.problems(8))


def test_more_processes_than_the_memory_holds():
    (problem,) = CpuPlatform().problems(10**6)
    assert problem.message.startswith("1000000 processes take 250000 GiB before they hold any number")
    assert problem.kind == "environment" and "dsplugins launch" in problem.remedy


def test_core_is_not_compiled(single):
    from megatron.core import jit

    def function():
        return 1

    assert jit.jit_fuser(function) is function


def test_settings_name_fields_of_core(single):
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    names = {f"model.{field.name}" for field in fields(MLATransformerConfig)}
    assert set(Cpu().ds_settings(plan=SimpleNamespace())) <= names
