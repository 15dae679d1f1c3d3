"""What a top-k router with groups can't have, and what the routers here don't do."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from dsplugins.contracts import Problem

UNSERVED = (
    "moe_router_force_load_balancing",
    "moe_router_force_biased",
    "moe_router_topk_limited_devices",
    "moe_router_fusion",
    "moe_enable_routing_replay",
    "moe_z_loss_coeff",
    "moe_input_jitter_eps",
    "moe_expert_capacity_factor",
)
"""Fields of megatron-core's TopKRouter that would have no effect here."""


def router_problems(config: Any, plugin: str, *others: str) -> Iterable[Problem]:
    """Problems of a configuration with router `plugin`, which doesn't do `others` either.

    None where the model has no experts.
    """
    if not config.num_moe_experts:
        return
    for field in (*UNSERVED, *others):
        value = getattr(config, field)
        if value:
            said = f"model.{field}={value} would have no effect: router {plugin} doesn't do it"
            yield Problem(said, f"model.{field}", f"leave it out, or name another router than {plugin}")
    yield from size_problems(config)


def size_problems(config: Any) -> Iterable[Problem]:
    """Problems of `moe_router_topk`, `moe_router_num_groups` and `moe_router_group_topk` with E experts."""
    experts, topk = config.num_moe_experts, config.moe_router_topk
    groups, kept = config.moe_router_num_groups, config.moe_router_group_topk
    if topk > experts:
        said = f"model.moe_router_topk={topk} is more than model.num_moe_experts={experts}"
        yield Problem(said, "model.moe_router_topk", f"use at most {experts}")
    if bool(groups) != bool(kept):
        said = "model.moe_router_num_groups and model.moe_router_group_topk go together"
        yield Problem(said, "model.moe_router_num_groups", "set both or neither")
    elif groups:
        yield from _group_problems(experts, topk, groups, kept)


def _group_problems(experts: int, topk: int, groups: int, kept: int) -> Iterable[Problem]:
    size, left = divmod(experts, groups)
    if left:
        said = f"model.moe_router_num_groups={groups} does not divide model.num_moe_experts={experts}"
        yield Problem(said, "model.moe_router_num_groups", f"choose a divisor of {experts}")
        return
    if size < 2:
        said = f"model.moe_router_num_groups={groups} makes groups of one of model.num_moe_experts={experts}"
        yield Problem(said, "model.moe_router_num_groups", f"use at most {experts // 2}, or leave groups out")
        return
    if kept > groups:
        said = f"model.moe_router_group_topk={kept} is more than model.moe_router_num_groups={groups}"
        yield Problem(said, "model.moe_router_group_topk", f"use at most {groups}")
        return
    if topk % kept:
        said = f"model.moe_router_group_topk={kept} does not divide model.moe_router_topk={topk}"
        yield Problem(said, "model.moe_router_group_topk", "a group's score is its K / M highest affinities")
    elif topk > kept * size:
        said = (
            f"model.moe_router_group_topk={kept} groups of {size} experts can't give "
            f"model.moe_router_topk={topk} experts"
        )
        yield Problem(said, "model.moe_router_group_topk", "keep more groups, or choose fewer experts")
