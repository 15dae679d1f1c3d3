"""The local backend: whose parts it has, and what it refuses."""

from types import SimpleNamespace

import pytest

from dsplugins.plugins.backend.torch_local import TorchLocal
from dsplugins.testing import prepare_cpu


@pytest.fixture(autouse=True, scope="module")
def cpu():
    prepare_cpu()


def test_linears_are_cores_and_no_global_of_core_moves():
    from megatron.core.models import backends
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    from dsplugins.plugins.backend.norm import Norm

    before = backends.LNImpl
    provider = TorchLocal().ds_backend(config=None)
    assert provider.column_parallel_linear() is ColumnParallelLinear
    assert provider.row_parallel_linear() is RowParallelLinear
    assert provider.layer_norm() is provider.layer_norm(rms_norm=True, for_qk=True) is Norm
    assert backends.LNImpl is before, "core's own layer_norm() writes this global"
    assert not provider.fuse_layernorm_and_linear()
    with pytest.raises(ValueError, match="residual"):
        provider.layer_norm(has_residual=True)


SOUND = {
    **dict(attention_dropout=0.0, context_parallel_size=1, window_size=None, softmax_type="vanilla"),
    **dict(apply_query_key_layer_scaling=False, normalization="RMSNorm", layernorm_zero_centered_gamma=False),
    **dict(memory_efficient_layer_norm=False, fused_residual_rmsnorm=False, use_te_activation_func=False),
    **dict(cpu_offloading=False),
    **dict(recompute_granularity=None, recompute_modules=["core_attn"]),
}


def problems(**changes):
    settings = SimpleNamespace(model=SimpleNamespace(**SOUND | changes))
    return list(TorchLocal().ds_check(plan=None, settings=settings))


def test_check_names_norms_it_lacks():
    found = problems(normalization="L2Norm", layernorm_zero_centered_gamma=True)
    assert [p.key for p in found] == ["model.normalization", "model.layernorm_zero_centered_gamma"]
    assert all(p.remedy for p in found) and problems() == []


@pytest.mark.parametrize("installed", [None, object()])
def test_cores_recompute_of_norms_is_for_transformer_engine(monkeypatch, installed):
    """Without it core fails with a NameError in the first backward, on any device."""
    asked = {"recompute_granularity": "selective", "recompute_modules": ["layernorm"]}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: installed)
    (found,) = problems(**asked)
    assert found.key == "model.recompute_modules" and "v3_recompute" in found.remedy
