"""How near to a tie the routers' choices are: what a difference of integer counts has to be explained by."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import torch

NEAR = 1e-5
"""Affinities lie between 0 and 1; layouts round them apart by about 1e-6 after some steps."""

Ties = dict[str, list[int]]
"""Router -> tokens of this rank that stood near a tie, for each step."""


def margins(choice: torch.Tensor, topk: int, groups: int | None, kept: int | None) -> torch.Tensor:
    """[T]: what has to change in `choice` [T, E] until another expert is chosen, at most.

    The gap between the last chosen expert and the next one, or between the last kept group and the next.
    """
    gaps = []
    if groups and kept and kept < groups:
        best = choice.view(len(choice), groups, -1).topk(topk // kept, dim=-1).values.sum(-1)
        ordered = best.sort(dim=-1, descending=True)
        gaps.append(ordered.values[:, kept - 1] - ordered.values[:, kept])
        allowed = torch.zeros_like(best, dtype=torch.bool).scatter(1, ordered.indices[:, :kept], True)
        choice = choice.masked_fill(~allowed.repeat_interleave(choice.shape[1] // groups, 1), -torch.inf)
    ordered = choice.sort(dim=-1, descending=True).values
    gaps.append(ordered[:, topk - 1] - ordered[:, topk])
    return torch.stack(gaps).amin(0)


@contextlib.contextmanager
def watched() -> Iterator[Ties]:
    """Count, in every training step of this process, the tokens that stand near a tie."""
    from dsplugins.plugins.router.aux_free_router import AuxFreeRouter

    ties: Ties = {}
    choose, update_bias = AuxFreeRouter.choose, AuxFreeRouter.update_bias

    def name(router: Any) -> str:
        return "mtp.0" if router.is_mtp_layer else f"decoder.{router.layer_number - 1}"

    def watching(self: Any, scores: torch.Tensor) -> Any:
        if self.recording:
            config = self.config
            sizes = (config.moe_router_topk, config.moe_router_num_groups, config.moe_router_group_topk)
            near = (margins((scores + self.expert_bias).detach(), *sizes) < NEAR).sum()
            ties.setdefault(name(self), [0])[-1] += int(near)
        return choose(self, scores)

    def ending(self: Any, counts: torch.Tensor) -> None:
        ties.setdefault(name(self), [0]).append(0)
        update_bias(self, counts)

    with (
        mock.patch.object(AuxFreeRouter, "choose", watching),
        mock.patch.object(AuxFreeRouter, "update_bias", ending),
    ):
        yield ties


def steps_alike(ours: Any, theirs: Any, ties: Sequence[Mapping[str, list[int]]], names: Sequence[str]) -> int:
    """Steps before the first one whose counts [steps][L][E] differ.

    There, each assignment that moved must belong to a token that stood near a tie on some rank; raises
    AssertionError for a router that moved more than it has such tokens.
    """
    for step, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        if mine == other:
            continue
        first = next(i for i, layers in enumerate(zip(mine, other, strict=True)) if layers[0] != layers[1])
        # Layers behind the first one that differs get other inputs: only that one can be explained.
        moved = sum(abs(a - b) for a, b in zip(mine[first], other[first], strict=True)) // 2
        near = sum(rank.get(names[first], [0] * (step + 1))[step] for rank in ties)
        assert moved <= near, f"step {step + 1}, {names[first]}: {moved} moved, {near} stood near a tie"
        return step
    return len(ours)
