"""One decoder layer of V3 at full width, on one rank: its MoE layer and its MLA block, built as in a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from dsplugins import process_group
from dsplugins.experiments.gpu import LAYER
from dsplugins.plan import prepare
from dsplugins.recipe import Recipe

if TYPE_CHECKING:
    from dsplugins.contracts import Plan, Platform, Settings
    from dsplugins.manager import Plugins

ALONE = (
    *("run.world_size=1", "parallel.pipeline=1", "parallel.expert=1"),
    *("model.num_layers=1", "model.pipeline_model_parallel_layout=null", "plugins.gpt.dense_layers=0"),
    *("plugins.mtp=null", "plugins.v3_recompute=null", "plugins.expert_load=null"),
)
"""One of the recipe's layers with all its experts, and nothing around it."""
FEW = ("model.num_moe_experts=16",)
"""Where the experts are not looked at: as few as V3's groups of them allow."""


@dataclass(frozen=True)
class Layer:
    """What was built, and with what."""

    module: Any
    """A megatron-core TransformerLayer: `mlp` is the MoE layer, `self_attention` the MLA block."""
    plan: Plan
    settings: Settings
    platform: Platform
    device: torch.device

    def noise(self, *shape: int, seed: int) -> torch.Tensor:
        """N(0, 1) in the weights' type, the same on every device."""
        drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        return drawn.to(self.device, self.settings.model.params_dtype)

    def wrapped(self) -> Any:
        """The layer in core's DDP, which gives its weights FP32 buffers for their gradients."""
        from dsplugins import model

        return model.data_parallel(self.module, self.settings)

    def tokens(self, seed: int = 1) -> torch.Tensor:
        """What a norm hands on, [S, B, H]: the recipe's sequence length and micro-batch."""
        shape = self.plan.data.seq_length, self.plan.train.micro_batch, self.settings.model.hidden_size
        return self.noise(*shape, seed=seed)


def alone(overrides: Sequence[str]) -> tuple[Recipe, Plugins, Plan]:
    """LAYER's recipe for one of its layers, with `overrides`, and what it names."""
    recipe = Recipe.load(LAYER, [*ALONE, *overrides])
    return recipe, *prepare(recipe)


def build(overrides: Sequence[str]) -> Layer:
    """The layer of LAYER with `overrides`, initialised; makes megatron-core's process groups."""
    recipe, plugins, plan = alone(overrides)
    platform, device = process_group.stand(plan, plugins)
    process_group.start(platform, plan)
    from megatron.core.transformer.spec_utils import build_module

    from dsplugins import model, settings, weights

    settled = settings.settle(plan, plugins, recipe)
    model.start_groups(plan.layout, plan.train.seed)
    spec = model.layer_spec(model.collect(plan, settled, plugins), moe=True)
    module = build_module(spec, config=settled.model, layer_number=1).to(device)
    weights.initialise([module], plan.train.seed, settled.model.init_method_std)
    return Layer(module.train(), plan, settled, platform, device)
