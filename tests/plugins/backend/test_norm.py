"""Norms: torch's bits, fp32 inside, and gradients that are whole under sequence parallelism."""

import pytest

from dsplugins.testing import model_parallel, prepare_cpu


@pytest.fixture(autouse=True, scope="module")
def cpu():
    prepare_cpu()


def make_config(**fields):
    import torch
    from megatron.core.transformer import TransformerConfig

    basic = {"num_layers": 1, "hidden_size": 24, "num_attention_heads": 2, "normalization": "RMSNorm"}
    return TransformerConfig(**{**basic, "params_dtype": torch.float32, **fields})


@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
def test_fp32_is_torchs_bit_for_bit(kind):
    import torch

    from dsplugins.plugins.backend.norm import Norm

    torch.manual_seed(0)
    ours = Norm(config=make_config(normalization=kind), hidden_size=24, eps=1e-6)
    torchs = getattr(torch.nn, kind)(24, eps=1e-6)
    torch.nn.init.normal_(ours.weight)
    torchs.load_state_dict(ours.state_dict())
    x = torch.randn(5, 3, 24, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    a, b = ours(x), torchs(y)
    a.pow(3).sum().backward()
    b.pow(3).sum().backward()
    assert torch.equal(a, b) and torch.equal(x.grad, y.grad)
    assert torch.equal(ours.weight.grad, torchs.weight.grad)


def test_bf16_is_computed_in_fp32():
    import torch

    from dsplugins.plugins.backend.norm import RMSNorm

    torch.manual_seed(0)
    norm = RMSNorm(make_config(params_dtype=torch.bfloat16, bf16=True), 24, 1e-6)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(50, 24).bfloat16()
    wide = x.double()
    exact = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * norm.weight.double()
    assert norm.weight.dtype == norm(x).dtype == torch.bfloat16
    # one rounding, at the end: at most half a unit in the last of 8 bits
    assert ((norm(x).double() - exact).abs() <= exact.abs() * 2**-8 * 1.001).all()


@pytest.mark.parametrize(
    "field", ["layernorm_zero_centered_gamma", "persist_layer_norm", "memory_efficient_layer_norm"]
)
def test_what_torch_lacks_is_refused(field):
    from dsplugins.plugins.backend.norm import Norm

    config = make_config()
    setattr(config, field, True)
    with pytest.raises(ValueError, match=field):
        Norm(config, 24)


def test_other_kinds_are_refused():
    from dsplugins.plugins.backend.norm import Norm

    config = make_config()
    config.normalization = "L2Norm"
    with pytest.raises(ValueError, match="L2Norm"):
        Norm(config, 24)


def split_sequence_gradient(marked):
    """Weight gradient of a norm over a split sequence after core's finalisation, and over the whole."""
    import torch
    import torch.distributed as dist
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.distributed.finalize_model_grads import finalize_model_grads
    from megatron.core.transformer.module import MegatronModule

    from dsplugins.plugins.backend.norm import Norm

    class Toy(MegatronModule):
        def __init__(self, config):
            super().__init__(config)
            self.norm = Norm(config=config, hidden_size=24, eps=1e-6)

    with model_parallel(tensor=2):
        config = make_config(tensor_model_parallel_size=2, sequence_parallel=True)
        chunk = Toy(config)
        assert chunk.norm.weight.sequence_parallel is True
        chunk.norm.weight.sequence_parallel = marked
        model = DistributedDataParallel(config, DistributedDataParallelConfig(), chunk)
        x = torch.randn(8, 2, 24, generator=torch.Generator().manual_seed(0))
        whole = torch.nn.RMSNorm(24, eps=1e-6)
        whole(x).pow(3).sum().backward()
        chunk.norm(x.chunk(2)[dist.get_rank()]).pow(3).sum().backward()
        finalize_model_grads([model])
        return chunk.norm.weight.main_grad.clone(), whole.weight.grad


def test_gradient_is_whole_under_sequence_parallelism(workers):
    import torch

    for ours, whole in workers(2).run(split_sequence_gradient, True):
        torch.testing.assert_close(ours, whole)
    for ours, whole in workers(2).run(split_sequence_gradient, False):
        assert not torch.allclose(ours, whole), "without the mark the test would not see a thing"
