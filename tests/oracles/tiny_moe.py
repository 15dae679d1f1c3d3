"""Routers, experts and dispatchers of the tiny V3, each built alone by its plugin's hook."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import MLATransformerConfig
from oracles.tiny import tiny_config

FREE: dict[str, Any] = {"moe_router_enable_expert_bias": False}
"""The host's own word: biases move by the plugin's `update_bias`, never by core."""


def moe_config(**changes: Any) -> MLATransformerConfig:
    """O1's configuration as the host would settle it."""
    return tiny_config(**(FREE | changes))


def groups() -> ProcessGroupCollection:
    """The process groups that core's MoE layer hands on."""
    return ProcessGroupCollection.use_mpu_process_groups()


def router(plugin: Any, config: MLATransformerConfig, seed: int = 3) -> torch.nn.Module:
    """A training router with a wide-spread gate, the same on every rank."""
    built = plugin.ds_router(config)(config=config, pg_collection=groups(), is_mtp_layer=False)
    built.weight.data.copy_(noise(*built.weight.shape, seed=seed) * 0.3)
    return built.train()


def core_router(config: MLATransformerConfig, like: torch.nn.Module) -> torch.nn.Module:
    """megatron-core's TopKRouter with the weights and biases of `like`."""
    from megatron.core.transformer.moe.router import TopKRouter

    built = TopKRouter(config=config, pg_collection=groups())
    built.weight.data.copy_(like.weight)
    if built.expert_bias is not None:
        built.expert_bias.copy_(like.expert_bias)
    built.set_layer_number(1)
    return built.train()


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    """N(0, 1), the same everywhere."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def balance_gradient(built: torch.nn.Module, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of gate [E, H] and input [S, B, H] that come from the balance loss alone."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    MoEAuxLossAutoScaler.main_loss_backward_scale = torch.ones(())
    hidden = hidden.clone().requires_grad_()
    built.zero_grad()
    probs, _ = built(hidden)
    (probs * 0).sum().backward()
    return built.weight.grad.clone(), hidden.grad
