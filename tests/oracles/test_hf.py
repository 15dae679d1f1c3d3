"""Oracles O1 and O2: the same weights in transformers' DeepseekV3 give the same logits and gradients.

Ours is the model of a run: `o1.yaml` names the plugins, and the host builds it from them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import SEQUENTIAL

pytest.importorskip("transformers")

O1 = Path(__file__).parent / "o1.yaml"
V3 = "deepseek_v3/v3_671b.yaml"
ROPE_FIELDS = (
    "rope_type",
    "rotary_base",
    "rotary_percent",
    "rotary_scaling_factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
)
OUR_YARN = {
    "rope_type": "yarn",
    "rotary_scaling_factor": 40.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}


def overrides(fields: dict[str, Any]) -> list[str]:
    return [f"model.{name}={'null' if value is None else value}" for name, value in fields.items()]


# -- what a worker does: one comparison each, numbers come back ------------------------------------


def main_model(
    changes: list[str], q_lora: int | None, rope: dict[str, Any], bias: float = 0.0
) -> dict[str, Any]:
    """Ours built from `o1.yaml` with `changes`, against theirs: distances of logits and gradients."""
    from built import tiny_model
    from oracles.hf_models import hf_model
    from oracles.hf_weights import megatron_names

    theirs = hf_model(q_lora, rope, bias)
    with tiny_model("plugins.mtp=null", *changes, recipe=O1) as (_, _, _, (ours,)):
        rename = renaming(ours)
        load(ours, rename(megatron_names(dict(theirs.state_dict()))))
        ids, positions = tokens()
        expected = theirs(ids, position_ids=positions).logits
        logits = ours(ids, positions, None)
        direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
        (expected * direction).mean().backward()
        (logits * direction).mean().backward()
        return {
            "spread": expected.std().item(),
            "logits": (logits - expected).abs().max().item(),
            "gradients": furthest(gradients(ours), rename(megatron_names(gradients(theirs)))),
            "classes": sorted({type(module).__name__ for module in ours.modules()}),
            "choice": chosen_below_zero(ours, ids, positions),
        }


def mtp_model(changes: list[str], rope: dict[str, Any]) -> dict[str, Any]:
    """O2: hidden states after the final norm, next tokens' embeddings, embedding first in `eh_proj`."""
    from built import tiny_model
    from oracles.hf_models import hf_model, scatter
    from oracles.hf_weights import megatron_mtp_names, megatron_names
    from transformers.modeling_layers import MtpModel

    theirs = hf_model(24, rope)
    head = MtpModel(theirs, 1).eval()
    scatter(head.layers, seed=8)
    ids, positions = tokens()
    hidden = theirs.model(ids, position_ids=positions).last_hidden_state
    drafted = head.forward_layer(0, hidden[:, :-1], positions[:, 1:], None, input_ids=ids[:, 1:])
    expected = theirs.lm_head(drafted)
    cross_entropy(expected[:, :-1], ids[:, 2:]).backward()
    theirs_too = megatron_names(gradients(theirs)) | megatron_mtp_names(named(head.layers))

    with tiny_model(*changes, recipe=O1) as (_, _, _, (ours,)):
        rename, state = renaming(ours), dict(head.state_dict())
        load(ours, rename(megatron_names(dict(theirs.state_dict())) | megatron_mtp_names(state)))
        logits = mtp_logits(ours, ids, positions)
        # Labels are the next tokens; the last one has none, and MTP's last two.
        labels = torch.cat([ids[:, 1:], torch.zeros_like(ids[:, :1])], dim=1)
        mask = torch.ones(ids.shape)
        mask[:, -1] = 0
        main = ours(ids, positions, None, labels=labels, loss_mask=mask)
        (main * 0).sum().backward()  # what is left is the MTP loss, which core adds in backward
        return {
            "spread": expected.std().item(),
            "logits": (logits[:, :-1] - expected).abs().max().item(),
            "gradients": furthest(gradients(ours), rename(theirs_too)),
        }


def tokens() -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and positions, both int64 [2, 16]."""
    ids = torch.randint(264, (2, 16), generator=torch.Generator().manual_seed(0))
    return ids, torch.arange(16).expand(2, 16)


def renaming(ours: torch.nn.Module) -> Any:
    """Packed experts keep their names; those of `sequential` are told apart."""
    from oracles.hf_weights import one_by_one

    packed = any(name.endswith("experts.weight1") for name, _ in ours.named_parameters())
    return dict if packed else one_by_one


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


def named(layers: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {f"layers.{name}": gradient for name, gradient in gradients(layers).items()}


def furthest(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> tuple[float, str]:
    """Largest relative L2 distance of a gradient, and whose it is."""
    assert set(ours) == set(theirs), set(ours) ^ set(theirs)
    return max((distance(ours[name], theirs[name]), name) for name in ours)


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Relative L2 distance; an expert that no token chose has no gradient on either side."""
    size = theirs.norm().item()
    return (ours - theirs).norm().item() / size if size else ours.norm().item()


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


def chosen_below_zero(model: torch.nn.Module, ids: torch.Tensor, positions: torch.Tensor) -> float:
    """Share of the chosen experts whose affinity plus bias is below zero."""
    from dsplugins import routers

    shares: list[torch.Tensor] = []

    def look(router: torch.nn.Module, args: Any, output: Any) -> None:
        scores = torch.sigmoid(args[0].flatten(0, 1) @ router.weight.T) + router.expert_bias
        shares.append((scores[output[1]] < 0).float().mean())

    handles = [router.register_forward_hook(look) for _, router in routers.local([model])]
    with torch.no_grad():
        model(ids, positions, None)
    for handle in handles:
        handle.remove()
    return torch.stack(shares).mean().item()


# -- what is held against it -----------------------------------------------------------------------


def same(found: dict[str, Any]) -> None:
    """The oracle's own tolerances, where the logits are wide enough for them to mean something."""
    assert found["spread"] > 0.3
    assert found["logits"] <= 1e-5
    size, name = found["gradients"]
    assert size <= 1e-5, name


@pytest.fixture(params=[24, None], ids=["q_lora", "no_q_lora"])
def q_lora(request):
    return request.param


@pytest.fixture(params=[False, True], ids=["rope", "yarn"])
def yarn(request):
    return request.param


def their_rope(yarn: bool) -> dict[str, Any]:
    from oracles.hf_models import PLAIN, YARN

    return YARN if yarn else PLAIN


def our_rope(yarn: bool) -> list[str]:
    return overrides(OUR_YARN if yarn else {})


def test_logits_and_gradients(workers, q_lora, yarn):
    changes = [*overrides({"q_lora_rank": q_lora}), *our_rope(yarn)]
    (found,) = workers(1).run(main_model, changes, q_lora, their_rope(yarn))
    same(found)
    assert {"LatentAttention", "AuxFreeRouter", "GroupedExperts"} <= set(found["classes"])


def test_with_sequential_experts(workers):
    (found,) = workers(1).run(main_model, SEQUENTIAL, 24, their_rope(False))
    same(found)
    assert "SequentialMLP" in found["classes"] and "GroupedExperts" not in found["classes"]


def test_the_rope_fields_of_the_671b_recipe(workers):
    """As they stand in the file: pre-training is published without scaling."""
    from dsplugins.recipe import Recipe

    model = Recipe.load(V3).sections["model"]
    given = {name: model[name] for name in ROPE_FIELDS if name in model}
    assert given, "the recipe says how it rotates"
    (found,) = workers(1).run(main_model, overrides(given), 24, their_rope(False))
    same(found)


@pytest.mark.parametrize(("bias", "least", "most"), [(-0.9, 0.1, 0.9), (-2.0, 1.0, 1.0)])
def test_where_affinity_plus_bias_is_negative(workers, bias, least, most):
    """Groups that are left out lose to any expert of a kept one, also to one below zero."""
    (found,) = workers(1).run(main_model, [], 24, their_rope(False), bias)
    assert least <= found["choice"] <= most
    same(found)


def test_a_difference_is_seen(workers):
    """The comparison can fail: YaRN on one side moves logits and gradients far beyond the tolerance."""
    (found,) = workers(1).run(main_model, [], 24, their_rope(True))
    assert found["logits"] > 1e-2 and found["gradients"][0] > 1e-2


def test_mtp(workers, yarn):
    (found,) = workers(1).run(mtp_model, our_rope(yarn), their_rope(yarn))
    same(found)


def test_mtp_with_sequential_experts(workers):
    (found,) = workers(1).run(mtp_model, SEQUENTIAL, their_rope(False))
    same(found)
