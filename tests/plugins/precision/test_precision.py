"""Both number formats write the same fields, all of them core's, and agree with each other."""

from dataclasses import fields

import pytest

from dsplugins.plugins.precision.bf16 import Bf16
from dsplugins.plugins.precision.fp32 import Fp32
from dsplugins.testing import prepare_cpu


@pytest.mark.parametrize("plugin", [Bf16, Fp32])
def test_settings_are_fields_of_core_and_make_valid_configs(plugin):
    prepare_cpu()
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    sections = {"model": MLATransformerConfig, "optimizer": OptimizerConfig}
    sections["ddp"] = DistributedDataParallelConfig
    chosen = {name: {} for name in sections}
    for key, value in plugin().ds_settings(plan=None).items():
        section, name = key.split(".")
        assert name in {field.name for field in fields(sections[section])}, key
        chosen[section][name] = value
    model = MLATransformerConfig(num_layers=2, hidden_size=8, num_attention_heads=2, **chosen["model"])
    optimizer = OptimizerConfig(**chosen["optimizer"])
    assert model.bf16 == optimizer.bf16 == (plugin is Bf16)


def test_the_backend_is_left_alone():
    backend = object()
    assert Bf16().ds_precision(config=None, backend=backend) is backend
    assert Fp32().ds_precision(config=None, backend=backend) is backend


def test_bf16_sums_gradients_in_fp32():
    assert Bf16().ds_settings(plan=None)["ddp.grad_reduce_in_fp32"] is True
