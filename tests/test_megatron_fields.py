"""Names read from megatron-core's source are those of its dataclasses."""

from __future__ import annotations

from dataclasses import fields

import pytest

from dsplugins import megatron_fields
from dsplugins.contracts import EnvironmentUnfit
from dsplugins.megatron_fields import defaults, field_names, unknown_fields
from dsplugins.words import Verbatim


def test_every_field_and_no_other():
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    built = {
        "model": MLATransformerConfig,
        "optimizer": OptimizerConfig,
        "ddp": DistributedDataParallelConfig,
    }
    for section, cls in built.items():
        assert megatron_fields.SOURCES[section][0] == cls.__name__
        assert field_names(section) == {field.name for field in fields(cls) if field.init}
        plain = {name: value for name, value in defaults(section).items() if not isinstance(value, Verbatim)}
        assert plain and plain == {field.name: field.default for field in fields(cls) if field.name in plain}


def test_ours_are_known_too():
    assert (
        list(unknown_fields({"model": {"vocab_size": 3, "hidden_size": 4}, "train": {"nonsense": 1}})) == []
    )
    (problem,) = unknown_fields({"optimizer": {"vocab_size": 3}})
    assert problem.key == "optimizer.vocab_size"


def test_without_megatron_core(monkeypatch):
    defaults.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EnvironmentUnfit, match="megatron-core is not installed"):
        field_names("ddp")
