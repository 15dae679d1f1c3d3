"""V3's layer beside its equations: the same checks at full width on a GPU and at tiny width on the CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.nn.functional import silu

TINY = (
    *("plugins.cuda=null", "plugins.cpu={}", "data.seq_length=64", "train.micro_batch=2"),
    *("model.hidden_size=64", "model.num_attention_heads=4", "model.q_lora_rank=32", "model.kv_lora_rank=16"),
    *("model.moe_ffn_hidden_size=32", "model.moe_shared_expert_intermediate_size=32"),
    *("model.ffn_hidden_size=64", "model.num_moe_experts=32", "model.init_method_std=0.1"),
    "plugins.torch_local.attention=torch",
)
"""Overrides for a CPU, in tests that run everywhere."""


@contextlib.contextmanager
def built(overrides: Sequence[str]) -> Iterator[Any]:
    """The layer of `experiment gpu` in this process's world; core's groups are gone afterwards."""
    from dsplugins.experiments.gpu_layer import build
    from dsplugins.testing import temporary_groups

    with temporary_groups():
        yield build(overrides)


def moe_facts(overrides: Sequence[str], looked_at: int = 4) -> dict[str, Any]:
    """A training pass of the MoE layer, and `looked_at` of its tokens by hand."""
    with built(["plugins.aux_free.sequence_loss=0.0", *overrides]) as layer:
        moe = layer.module.mlp
        hidden, gradient = layer.tokens(1).requires_grad_(), layer.tokens(2)
        with torch.no_grad():
            _, chosen = moe.router(hidden)
        output, _ = moe(hidden)
        output.backward(gradient)
        some = torch.linspace(0, len(chosen) - 1, looked_at).long()
        flat = [
            tensor.detach().flatten(0, 1).cpu()[some] for tensor in (hidden, gradient, output, hidden.grad)
        ]
        exact = tokens_by_hand(moe, *flat[:2], chosen.cpu()[some])
        peaks = [
            torch.stack([expert.abs().amax() for expert in weight.grad])
            for weight in (moe.experts.weight1, moe.experts.weight2)
        ]
        counts, groups = chosen.sum(0), layer.settings.model.moe_router_num_groups
        return {
            "tokens": len(chosen),
            "finite": bool(output.isfinite().all() and hidden.grad.isfinite().all()),
            "experts_a_token": chosen.sum(1).unique().tolist(),
            "groups_a_token": int(chosen.unflatten(1, (groups, -1)).any(-1).sum(1).max()),
            "counted": torch.equal(moe.router.local_tokens_per_expert.long(), counts),
            "busy": int((counts > 0).sum()),
            "gradients": all(torch.equal((peak > 0) & peak.isfinite(), counts > 0) for peak in peaks),
            "output_error": distance(flat[2], exact[0]),
            "gradient_error": distance(flat[3], exact[1]),
        }


def tokens_by_hand(
    moe: Any, hidden: torch.Tensor, gradient: torch.Tensor, chosen: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """arXiv 2412.19437, eq. 12-16, in FP32 on the CPU, expert by expert: output and gradient of [T, H].

    `chosen` [T, E] is the selection of the layer itself; weights are worked out here.
    """
    hidden = hidden.float().requires_grad_()
    gate = torch.sigmoid(hidden @ moe.router.weight.detach().float().cpu().T)
    shared = moe.shared_experts
    rows = []
    for token, affinities, mask in zip(hidden, gate, chosen, strict=True):
        row = expert(token, shared.linear_fc1.weight, shared.linear_fc2.weight)
        weights = affinities[mask] / affinities[mask].sum() * moe.config.moe_router_topk_scaling_factor
        for index, weight in zip(mask.nonzero().flatten().tolist(), weights, strict=True):
            row = row + weight * expert(token, moe.experts.weight1[index], moe.experts.weight2[index])
        rows.append(row)
    output = torch.stack(rows)
    output.backward(gradient.float())
    return output.detach(), hidden.grad


def expert(token: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """SwiGLU of one token [H] by weights [2I, H], gate rows first, and [H, I]."""
    first, second = (weight.detach().float().cpu() for weight in (first, second))
    gate, up = (first @ token).chunk(2)
    return second @ (silu(gate) * up)


def mla_errors(overrides: Sequence[str]) -> dict[str, float]:
    """Relative errors of output, input gradient and every weight's gradient of the attention block."""
    from oracles.latent import explicit, weights_of

    from dsplugins.experiments.gpu_layer import FEW

    with built([*FEW, *overrides]) as layer:
        block = layer.module.self_attention
        hidden, gradient = layer.tokens(1).requires_grad_(), layer.tokens(2)
        output, _ = block(hidden, None)
        output.backward(gradient)
        exact = {name: double(weight) for name, weight in weights_of(block).items()}
        wanted = double(hidden)
        expected = explicit(exact, wanted, layer.settings.model)
        expected.backward(gradient.cpu().double())
        found = {"output": distance(output, expected), "input": distance(hidden.grad, wanted.grad)}
        for name, weight in weights_of(block).items():
            found[name] = distance(weight.grad, exact[name].grad)
        return found


def double(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers as a leaf in float64 on the CPU."""
    return tensor.detach().cpu().double().requires_grad_()


def distance(mine: torch.Tensor, exact: torch.Tensor) -> float:
    """|mine - exact| / |exact|."""
    return float((mine.detach().cpu().double() - exact.detach().double()).norm() / exact.double().norm())
