"""megatron-core's own flex code over gloo: what `alltoall` does, whichever library carries the tokens."""

from __future__ import annotations

import contextlib
import functools
from unittest import mock

import pytest
from oracles.dispatch import CASES, expected, through, whole
from runs import trained

OWNERS = {
    "alltoall": "{}",
    "deepep": "{}",
    "hybridep": "{}",
    "nccl_ep": "{moe_expert_rank_capacity_factor: 4}",
}
FLEX = [name for name in OWNERS if name != "alltoall"]
NUMBERS = ("loss", "mtp_loss", "aux_loss", "grad_norm", "max_vio")
BF16 = ("plugins.fp32=null", "plugins.bf16={}")


@contextlib.contextmanager
def unchecked():
    """Stand-in libraries, without the checks that would say that there is no GPU."""
    from transports.installed import transports

    from dsplugins.hookspecs import hookimpl
    from dsplugins.plugins.dispatcher.flex import Flex

    nothing = hookimpl(lambda self, plan, settings: ())
    with transports(), mock.patch.object(Flex, "ds_check", nothing):
        yield


@contextlib.contextmanager
def watched(hidden):
    """Rows of that width that this rank sends to others, and each routing map that a dispatcher is given.

    With a map, how often its rows travel: there and back, and their gradients back and there.
    """
    import torch
    import torch.distributed as dist
    from megatron.core.transformer.moe import token_dispatcher as core

    seen = {"sent": 0, "maps": []}
    send, rank = dist.all_to_all_single, dist.get_rank()

    def sending(output, input, output_split_sizes=None, input_split_sizes=None, group=None):
        if input.ndim == 2 and input.shape[1] == hidden:
            seen["sent"] += int(sum(input_split_sizes)) - int(input_split_sizes[rank])
        return send(output, input, output_split_sizes, input_split_sizes, group=group)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(dist, "all_to_all_single", sending))
        for kind in (core.MoEAlltoAllTokenDispatcher, core.MoEFlexTokenDispatcher):

            def preparing(self, hidden_states, routing_map, probs, prepare=kind.dispatch_preprocess):
                seen["maps"].append((4 if torch.is_grad_enabled() else 2, routing_map.clone()))
                return prepare(self, hidden_states, routing_map, probs)

            stack.enter_context(mock.patch.object(kind, "dispatch_preprocess", preparing))
        yield seen


def carried(name, overrides):
    """A run by one dispatcher, and what it sent."""
    overrides = [*overrides, *([] if name == "alltoall" else ["plugins.alltoall=null"])]
    with unchecked(), watched(hidden=32) as seen:
        return trained([*overrides, f"plugins.{name}={OWNERS[name]}"]) | seen


@pytest.fixture(scope="module")
def run(workers):
    """`run(name, size, *overrides)`: what every rank found; a run that was made already is not made again."""

    @functools.cache
    def once(name, size, *overrides):
        small = [f"parallel.expert={size}", "train.steps=2", "train.micro_batch=2"]
        return workers(size).run(carried, name, [*small, *overrides])

    return once


def numbers(found):
    return [{key: row[key] for key in NUMBERS} for row in found["rows"]]


FULL = [("deepep", 2, ()), *((name, 4, BF16) for name in FLEX)]


@pytest.mark.parametrize(("name", "size", "overrides"), FULL)
def test_every_number_is_that_of_alltoall(run, name, size, overrides):
    """Two experts a token: a sum of two is the same in any order, so every bit is."""
    there, here = (run(owner, size, *overrides)[0] for owner in ("alltoall", name))
    assert numbers(here) == numbers(there)
    assert here["counts"] == there["counts"] and here["evaluation"] == there["evaluation"]


OVERLAP = ("plugins.one_f_one_b=null", "plugins.ep_overlap={}")


def test_overlapped_with_the_computation_of_another_micro_batch(run):
    """`ep_overlap` takes core's flex dispatcher apart, layer by layer, and nothing comes out otherwise."""
    plain, overlapped = (run("deepep", 2, *BF16, "plugins.mtp=null", *more)[0] for more in ((), OVERLAP))
    assert numbers(overlapped) == numbers(plain)
    assert overlapped["counts"] == plain["counts"] and overlapped["sent"] == plain["sent"] > 0


def alone(name, *args):
    """One dispatcher between given tokens and experts."""
    with unchecked():
        return through(name, *args)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", FLEX)
def test_four_experts_a_token_and_a_rank_without_any(workers, name, case):
    """The plain sum over experts, also where one rank gets nothing."""
    ranks = workers(2).run(alone, name, "grouped", 2, case)
    for key, wanted in expected(case).items():
        assert (whole(ranks)[key] - wanted).norm() < 2e-6 * wanted.norm(), key


@pytest.mark.parametrize("name", FLEX)
def test_experts_cut_over_two_ranks(workers, name):
    """Both ranks of an expert get each of its tokens."""
    ranks = workers(2).run(alone, name, "sequential", 1, "spread", 2)
    for key, wanted in expected("spread").items():
        assert (whole(ranks)[key] - wanted).norm() < 2e-6 * wanted.norm(), key


LIMITED = (
    *("model.num_moe_experts=16", "model.moe_router_topk=4"),
    *("model.moe_router_num_groups=4", "model.moe_router_group_topk=2", "plugins.mtp=null"),
)
"""Four nodes of one rank, a group of experts on each: a token may go to two of them."""


def copies(name, rank, routing_map):
    """Of each token, how many rows go to other nodes: one for each expert there, or one for each node."""
    import torch

    per_node = routing_map.view(len(routing_map), 4, -1).sum(-1)
    assert (per_node > 0).sum(1).max() == 2, "at most two groups a token"
    rows = per_node if name == "alltoall" else (per_node > 0).long()
    return rows[:, torch.arange(4) != rank].sum()


def test_between_nodes_a_token_goes_once_to_each_of_its_groups(run):
    """Rows on the wire between 4 nodes, in all, are those that the routing maps ask for."""
    sent = {}
    for name in ("alltoall", "deepep"):
        ranks = run(name, 4, *LIMITED)
        asked = sum(
            times * int(copies(name, rank, routing_map))
            for rank, found in enumerate(ranks)
            for times, routing_map in found["maps"]
        )
        sent[name] = sum(found["sent"] for found in ranks)
        assert sent[name] == asked > 0, name
    assert sent["deepep"] < 0.6 * sent["alltoall"]


def test_v3s_tokens_go_to_four_of_eight_nodes(single):
    """V3's gate, 256 experts on 8 nodes, a group of 32 on each: with its limit and without."""
    import torch
    from oracles.tiny_moe import moe_config, noise, router

    from dsplugins.plugins.router.aux_free import AuxFree

    nodes = {}
    for limit in (4, None):
        groups = {"moe_router_num_groups": 8 if limit else None, "moe_router_group_topk": limit}
        config = moe_config(num_moe_experts=256, moe_router_topk=8, **groups)
        gate = router(AuxFree(AuxFree.Options()), config)
        _, routing_map = gate(noise(4096, 1, config.hidden_size))
        assert torch.equal(routing_map.sum(1), torch.full((4096,), 8))
        nodes[limit] = routing_map.view(4096, 8, 32).any(-1).sum(1)
    assert nodes[4].max() == 4 and nodes[None].max() > 6
    assert nodes[4].float().mean() < nodes[None].float().mean() - 1
