"""Oracles O1 and O2: the same weights in transformers' DeepseekV3 give the same logits and gradients."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers")

YARN = {
    "rope_type": "yarn",
    "factor": 40.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
OUR_YARN = {
    "rope_type": "yarn",
    "rotary_scaling_factor": 40.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}


def hf_model(q_lora: int | None, yarn: bool) -> torch.nn.Module:
    """DeepseekV3ForCausalLM in the sizes of oracle O1, with weights that make every part matter."""
    config = transformers.DeepseekV3Config(
        vocab_size=160,
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=32,
        num_hidden_layers=3,
        first_k_dense_replace=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        n_shared_experts=1,
        q_lora_rank=q_lora,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        routed_scaling_factor=2.5,
        rope_parameters={"rope_theta": 10000.0} | (YARN if yarn else {"rope_type": "default"}),
        attn_implementation="eager",
        experts_implementation="eager",
    )
    model = transformers.DeepseekV3ForCausalLM(config).eval()
    scatter(model)
    return model


def scatter(model: torch.nn.Module, seed: int = 7) -> None:
    """Weights N(0, .08), gate N(0, .3), correction bias N(0, .05), norms 1 +- .1."""
    generator = torch.Generator().manual_seed(seed)
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for name, value in state.items():
            if name.endswith("inv_freq"):
                continue
            noise = torch.randn(value.shape, generator=generator)
            if "norm" in name:
                value.copy_(1 + 0.1 * noise)
            elif "e_score_correction_bias" in name:
                value.copy_(0.05 * noise)
            else:
                value.copy_((0.3 if name.endswith("mlp.gate.weight") else 0.08) * noise)


def load(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Copy `weights` in; every parameter of `model` must be among them and every weight used."""
    own = dict(model.named_parameters()) | {n: b for n, b in model.named_buffers() if n in weights}
    assert set(own) == set(weights), set(own) ^ set(weights)
    with torch.no_grad():
        for name, value in weights.items():
            assert own[name].shape == value.shape, name
            own[name].copy_(value)


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def furthest(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> tuple[float, str]:
    """Largest relative L2 distance of a gradient, and whose it is."""
    assert set(ours) == set(theirs), set(ours) ^ set(theirs)
    apart = {name: _distance(ours[name], theirs[name]) for name in ours}
    worst = max(apart, key=lambda name: apart[name])
    return apart[worst], worst


def _distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Relative L2 distance; an expert that no token chose has no gradient on either side."""
    size = theirs.norm().item()
    return (ours - theirs).norm().item() / size if size else ours.norm().item()


@pytest.fixture(params=[24, None], ids=["q_lora", "no_q_lora"])
def q_lora(request):
    return request.param


@pytest.fixture(params=[False, True], ids=["rope", "yarn"])
def yarn(request):
    return request.param


def both(q_lora: int | None, yarn: bool, mtp: object = None):
    """Theirs and ours with the same weights."""
    from oracles.hf_weights import megatron_names
    from oracles.tiny import build_tiny, tiny_config

    from dsplugins.plugins.attention.mla import Mla

    theirs = hf_model(q_lora, yarn)
    changes = {"q_lora_rank": q_lora} | (OUR_YARN if yarn else {})
    if mtp is not None:
        changes |= {"mtp_num_layers": 1, "mtp_loss_scaling_factor": 1.0}
    ours = build_tiny(tiny_config(**changes), Mla(), mtp).eval()
    weights = megatron_names(dict(theirs.state_dict()))
    return theirs, ours, weights


def test_logits_and_gradients(single, q_lora, yarn):
    from oracles.hf_weights import megatron_names
    from oracles.tiny import tokens

    theirs, ours, weights = both(q_lora, yarn)
    load(ours, weights)
    ids, positions = tokens()
    expected = theirs(ids, position_ids=positions).logits
    logits = ours(ids, positions, None)
    assert expected.std() > 0.3
    assert (logits - expected).abs().max() <= 1e-5
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    (expected * direction).mean().backward()
    (logits * direction).mean().backward()
    distance, name = furthest(gradients(ours), megatron_names(gradients(theirs)))
    assert distance <= 1e-5, name


def test_yarn_is_seen(single):
    """The comparison can fail: YaRN moves the logits by far more than the tolerance."""
    from oracles.tiny import tokens

    theirs, ours, weights = both(24, False)
    load(ours, weights)
    stretched = hf_model(24, True)
    ids, positions = tokens()
    assert (stretched(ids, position_ids=positions).logits - ours(ids, positions, None)).abs().max() > 1e-2


def test_mtp(single, yarn):
    """O2: hidden states after the final norm, next tokens' embeddings, embedding first in `eh_proj`."""
    from oracles.hf_weights import megatron_mtp_names, megatron_names
    from oracles.tiny import tokens
    from transformers.modeling_layers import MtpModel

    from dsplugins.plugins.mtp.mtp import Mtp, MtpOptions

    theirs, ours, weights = both(24, yarn, mtp=Mtp(MtpOptions()))
    head = MtpModel(theirs, 1).eval()
    scatter(head.layers, seed=8)
    load(ours, weights | megatron_mtp_names(dict(head.state_dict())))
    ids, positions = tokens()
    hidden = theirs.model(ids, position_ids=positions).last_hidden_state
    drafted = head.forward_layer(0, hidden[:, :-1], positions[:, 1:], None, input_ids=ids[:, 1:])
    expected = theirs.lm_head(drafted)
    loss = cross_entropy(expected[:, :-1], ids[:, 2:])
    loss.backward()

    logits = mtp_logits(ours, ids, positions)
    assert (logits[:, :-1] - expected).abs().max() <= 1e-5
    # Labels are the next tokens; the last one has none, and MTP's last two.
    labels = torch.cat([ids[:, 1:], torch.zeros_like(ids[:, :1])], dim=1)
    mask = torch.ones(ids.shape)
    mask[:, -1] = 0
    main = ours(ids, positions, None, labels=labels, loss_mask=mask)
    (main * 0).sum().backward()  # what is left is the MTP loss, which core adds in backward
    distance, name = furthest(
        {n: g for n, g in gradients(ours).items()},
        megatron_names(gradients(theirs)) | megatron_mtp_names(named(head.layers)),
    )
    assert distance <= 1e-5, name


def named(layers: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {f"layers.{name}": gradient for name, gradient in gradients(layers).items()}


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def mtp_logits(model: torch.nn.Module, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Logits of the first MTP block, [B, S, V]; the last position has no next token."""
    kept: list[torch.Tensor] = []
    handle = model.mtp.register_forward_hook(lambda module, args, output: kept.append(output))
    with torch.no_grad():
        model(ids, positions, None)
        handle.remove()
        logits, _ = model.output_layer(kept[0].chunk(2)[1])
    return logits.transpose(0, 1)
