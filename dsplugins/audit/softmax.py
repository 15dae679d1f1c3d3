"""The softmax scale of latent attention, computed from the recipe's own words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from megatron.core.transformer.multi_latent_attention import MultiLatentAttention

from dsplugins.audit.layers import layers

if TYPE_CHECKING:
    from dsplugins.audit.built import Standing


def differences(run: Standing) -> Iterable[tuple[str, str]]:
    """YaRN's mscale squared belongs to `rope_type: yarn` alone (report, 4.3).

    megatron-core multiplies by it whatever the type is, with a factor of 40 where none is given.
    """
    config = run.settings.model
    for name, layer, _ in layers(config, run.chunks):
        attention = layer.self_attention
        if not isinstance(attention, MultiLatentAttention):
            continue
        wanted = scale(run.plan.model, config)
        for part in (attention, getattr(attention, "core_attention", None)):
            stands = getattr(part, "softmax_scale", None)
            if stands is not None and not math.isclose(stands, wanted, rel_tol=1e-6):
                said = f"{type(part).__name__} scales the softmax by {stands:.6g}, the recipe by {wanted:.6g}"
                yield name, said


def scale(asked: Mapping[str, Any], config: Any) -> float:
    """mscale^2 / sqrt(d) with mscale = 0.1 mscale_all_dim ln(factor) + 1, or 1 without YaRN (facts 1.4)."""
    mscale = 1.0
    if asked.get("rope_type") == "yarn":
        factor, weight = (
            asked.get(field, getattr(config, field)) for field in ("rotary_scaling_factor", "mscale_all_dim")
        )
        mscale = 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0
    return mscale**2 / math.sqrt(config.qk_head_dim + config.qk_pos_emb_head_dim)
