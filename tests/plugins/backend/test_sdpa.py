"""Core attention against softmax(Q K^T) V written out in fp64, and inside megatron-core's MLA."""

from types import SimpleNamespace

import pytest

from dsplugins.testing import prepare_cpu


@pytest.fixture(autouse=True, scope="module")
def cpu():
    prepare_cpu()


def make_config(**fields):
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    basic = dict(
        num_layers=1, hidden_size=32, num_attention_heads=4, multi_latent_attention=True, q_lora_rank=16,
        kv_lora_rank=16, qk_head_dim=8, qk_pos_emb_head_dim=4, v_head_dim=8, rope_type="rope",
        rotary_scaling_factor=1.0, normalization="RMSNorm", qk_layernorm=True, add_bias_linear=False,
        attention_dropout=0.0, hidden_dropout=0.0, use_cpu_initialization=True, apply_rope_fusion=False,
        transformer_impl="local",
    )  # fmt: skip
    return MLATransformerConfig(**{**basic, **fields})


def make(config=None, **arguments):
    from megatron.core.transformer.enums import AttnMaskType

    from dsplugins.plugins.backend.sdpa import SdpaCoreAttention

    config = config or make_config()
    return SdpaCoreAttention(config, 1, AttnMaskType.causal, "self", **arguments)


def explicit(query, key, value, scale):
    """[S, B, N, D], [S, B, G, D], [S, B, G, V] -> [S, B, N * V], every number in fp64."""
    import torch

    repeat = query.shape[2] // key.shape[2]
    q, k, v = query.double(), key.double(), value.double()
    k, v = k.repeat_interleave(repeat, 2), v.repeat_interleave(repeat, 2)
    scores = torch.einsum("sbnd,tbnd->bnst", q, k) * scale
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("bnst,tbnv->sbnv", weights, v).flatten(2)


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("sizes", [(12, 8), (8, 8), (8, 12), (48, 32)])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_equals_the_written_out_form(groups, sizes, scale):
    import torch

    torch.manual_seed(0)
    shapes = (4, sizes[0]), (groups, sizes[0]), (groups, sizes[1])
    mine = [torch.randn(9, 2, *shape, requires_grad=True) for shape in shapes]
    exact = [tensor.detach().double().requires_grad_() for tensor in mine]
    out = make(softmax_scale=scale)(*mine, None)
    want = explicit(*exact, sizes[0] ** -0.5 if scale is None else scale)
    torch.testing.assert_close(out.double(), want, atol=2e-6, rtol=2e-6)
    assert out.shape == (9, 2, 4 * sizes[1])
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    (want * weight).sum().backward()
    for ours, theirs in zip(mine, exact, strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, atol=1e-5, rtol=1e-5)


def test_bf16_stays_close():
    import torch

    torch.manual_seed(0)
    mine = [torch.randn(64, 2, 4, size).bfloat16() for size in (48, 48, 32)]
    out = make()(*mine, None)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), explicit(*mine, 48**-0.5), atol=2e-2, rtol=2e-2)


def test_blocks_of_uneven_length_and_their_gradients():
    """150 rows are four blocks of 37 and one of 2; a later key never reaches an earlier query."""
    import torch

    torch.manual_seed(0)
    mine = [torch.randn(150, 2, 4, size, requires_grad=True) for size in (12, 12, 8)]
    exact = [tensor.detach().double().requires_grad_() for tensor in mine]
    out, want = make(softmax_scale=0.3)(*mine, None), explicit(*exact, 0.3)
    torch.testing.assert_close(out.double(), want, atol=2e-6, rtol=2e-6)
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    (want * weight).sum().backward()
    for ours, theirs in zip(mine, exact, strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, atol=2e-5, rtol=1e-5)


def test_keeps_nothing_of_the_size_of_the_scores():
    import torch

    kept = []

    def note(tensor):
        kept.append(tensor.numel())
        return tensor

    mine = [torch.randn(256, 1, 2, 8, requires_grad=True) for _ in range(3)]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        make()(*mine, None)
    assert kept and max(kept) == mine[0].numel() < 256 * 256


def test_both_call_shapes_of_core_are_tolerated():
    make(softmax_scale=None, cp_comm_type=None, pg_collection=None)
    make(softmax_scale=0.1, k_channels=12, v_channels=8, cp_comm_type=None, pg_collection=None)


@pytest.mark.parametrize(
    ("field", "value"),
    [("attention_dropout", 0.1), ("context_parallel_size", 2), ("window_size", (4, 0)),
     ("softmax_type", "learnable"), ("apply_query_key_layer_scaling", True)],
)  # fmt: skip
def test_unmet_wishes_are_errors_and_problems(field, value):
    from dsplugins.plugins.backend.torch_local import TorchLocal

    config = make_config()
    setattr(config, field, value)
    with pytest.raises(ValueError, match="with torch_local"):
        make(config)
    (problem,) = TorchLocal().ds_check(plan=None, settings=SimpleNamespace(model=config))
    assert problem.key in problem.message and problem.remedy
    assert problem.key.split(".")[1] in field


def test_masks_and_packed_sequences_are_refused():
    import torch
    from megatron.core.transformer.enums import AttnMaskType

    qkv = [torch.randn(4, 1, 4, 8) for _ in range(3)]
    attention = make()
    for refused in (
        {"attention_mask": torch.zeros(1, 1, 4, 4, dtype=torch.bool)},
        {"attn_mask_type": AttnMaskType.padding},
        {"packed_seq_params": object()},
        {"attention_bias": torch.zeros(1)},
        {"something_new": 1},
    ):
        with pytest.raises(ValueError):
            attention(*qkv, **refused)
    with pytest.raises(ValueError, match="training only"):
        attention(qkv[0][:1], *qkv[1:])


def test_mla_of_core_builds_on_it_and_is_causal(single):
    import torch
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules

    from dsplugins.plugins.backend.norm import RMSNorm
    from dsplugins.plugins.backend.sdpa import SdpaCoreAttention
    from dsplugins.plugins.backend.torch_local import TorchLocal

    config = make_config()
    backend = TorchLocal().ds_backend(config=config)
    column, norm = backend.column_parallel_linear(), backend.layer_norm(rms_norm=True, for_qk=True)
    parts = MLASelfAttentionSubmodules(
        linear_q_down_proj=column, linear_q_up_proj=column, linear_kv_down_proj=column,
        linear_kv_up_proj=column, linear_proj=backend.row_parallel_linear(), q_layernorm=norm,
        kv_layernorm=norm, core_attention=backend.core_attention(),
    )  # fmt: skip
    attention = MLASelfAttention(config, parts, 1, AttnMaskType.causal)
    assert type(attention.core_attention) is SdpaCoreAttention and type(attention.q_layernorm) is RMSNorm
    x = torch.randn(10, 2, 32, requires_grad=True)
    out, _ = attention(x, None)
    out[4].sum().backward()
    assert x.grad[:5].abs().sum(dim=(1, 2)).min() > 0
    assert x.grad[5:].abs().max() == 0
    assert all(parameter.grad is not None for parameter in attention.parameters())
