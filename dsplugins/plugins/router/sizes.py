"""Sizes that a top-k router with groups can't have."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from dsplugins.contracts import Problem


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
        return
    if not groups:
        return
    if experts % groups:
        said = f"model.moe_router_num_groups={groups} does not divide model.num_moe_experts={experts}"
        yield Problem(said, "model.moe_router_num_groups", "choose a divisor")
        return
    if kept > groups:
        said = f"model.moe_router_group_topk={kept} is more than model.moe_router_num_groups={groups}"
        yield Problem(said, "model.moe_router_group_topk", f"use at most {groups}")
    if topk % kept:
        said = f"model.moe_router_group_topk={kept} does not divide model.moe_router_topk={topk}"
        yield Problem(said, "model.moe_router_group_topk", "a group's score is its K / M highest affinities")
    elif topk // kept > experts // groups:
        said = f"{kept} groups of {experts // groups} experts can't give model.moe_router_topk={topk} experts"
        yield Problem(said, "model.moe_router_group_topk", "keep more groups, or choose fewer experts")
