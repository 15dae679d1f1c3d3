"""Stacked gradients taken apart: in the order in which a model of experts held apart has them."""

from __future__ import annotations

import pytest
import torch
from runs import SEQUENTIAL

BF16 = ["plugins.fp32=null", "plugins.bf16={}"]
WHOLE = ["plugins.adamw.zero=false"]
ONE_UNDECAYED = {"grouped": "*experts.weight2", "sequential": "*experts.local_experts.*.linear_fc2.weight"}


def order(overrides):
    """Of each optimizer: (module, expert, matrix, elements) of each gradient that is summed, in turn."""
    from runs import assembled

    from dsplugins.optimizer_groups import placements

    with assembled(overrides) as run:
        found = []
        for part, stacked in zip(run.optimizer.chained_optimizers, run.optimizer._stacked, strict=True):
            codes = {}
            for place in placements(part, run.chunks):
                place.main.grad = place.main.new_zeros(place.main.shape)
                for piece, name in pieces(place):
                    codes[len(codes) + 1] = name
                    piece.fill_(len(codes))
            grads = stacked.apart([parameter.grad for parameter in part.get_parameters()])
            found.append([(*codes[int(grad.flatten()[0])], grad.numel()) for grad in grads])
            assert all((grad == grad.flatten()[0]).all() for grad in grads)
        return found


def pieces(place):
    """(part of a gradient, its name): an expert's matrix each, or what of it this rank optimizes."""
    module, _, name = place.name.rpartition(".")
    if name in ("weight1", "weight2"):
        owners = torch.arange(len(place.parameter)).repeat_interleave(place.parameter[0].numel())
        here = owners[place.start : place.stop]
        flat = place.main.grad.view(-1)
        experts = [int(expert) for expert in here.unique()]
        return [(flat[span(here == expert)], (module, expert, name[-1])) for expert in experts]
    if ".local_experts." in place.name:
        before, _, after = place.name.partition(".local_experts.")
        expert, linear, _ = after.split(".")
        return [(place.main.grad, (before, int(expert), linear[-1]))]
    return [(place.main.grad, (place.name, 0, ""))]


def span(there):
    """The slice of consecutive true elements."""
    first = int(there.int().argmax())
    return slice(first, first + int(there.sum()))


@pytest.mark.parametrize(
    "overrides",
    [[], WHOLE, BF16, [*BF16, *WHOLE]],
    ids=["zero", "whole", "bf16 zero", "bf16 whole"],
)
def test_in_the_order_of_experts_held_apart(workers, overrides):
    apart = workers(1).run(order, [*overrides, *SEQUENTIAL])[0]
    assert sum(len({name for name, _, which, _ in part if which}) for part in apart) == 4
    assert workers(1).run(order, overrides)[0] == apart


def test_where_another_rule_parts_the_matrices(workers):
    """One of them without weight decay: the two stacks are in groups of their own."""
    decayed = [
        f"plugins.adamw.no_decay=[vectors,'{ONE_UNDECAYED[kind]}']" for kind in ("grouped", "sequential")
    ]
    apart = workers(1).run(order, [decayed[1], *SEQUENTIAL])[0]
    assert workers(1).run(order, [decayed[0]])[0] == apart


@pytest.mark.parametrize("overrides", [[], BF16], ids=["fp32", "bf16"])
def test_where_zero_cuts_them(workers, overrides):
    """Each of two data-parallel ranks has the same elements in the same order; one has a part of a matrix."""
    apart = workers(2).run(order, [*overrides, *SEQUENTIAL])
    assert workers(2).run(order, overrides) == apart
    assert len({size for rank in apart for part in rank for *_, which, size in part if which}) > 2
    assert apart[0] != apart[1]
