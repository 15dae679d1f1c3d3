"""Copies of tokens, added up where the tokens are: numbers, gradients, and whole dispatchers that do so."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from oracles.dispatch import CASES, expected, through, whole

from dsplugins.plugins.dispatcher import alltoall_dispatcher
from dsplugins.plugins.dispatcher.copies import FromCopies, Order, ToCopies

TOKENS, K, WIDTH = 7, 3, 5


@pytest.fixture
def order():
    shuffled = torch.arange(TOKENS).repeat(K)[torch.randperm(TOKENS * K)]
    return Order.of(shuffled, K)


def test_each_token_finds_its_copies(order):
    x = torch.randn(TOKENS, WIDTH)
    assert torch.equal(order.copied(x), x[order.tokens])
    assert torch.equal(order.tokens[order.places], torch.arange(TOKENS)[:, None].expand(-1, K))
    assert (order.places.diff(dim=1) > 0).all() and order.places.flatten().unique().numel() == TOKENS * K


def test_sums_are_rounded_once(order):
    copies = torch.randn(TOKENS * K, WIDTH).bfloat16()
    exact = copies.double()[order.places].sum(1)
    summed = order.summed(copies)
    assert summed.dtype == torch.bfloat16
    close = exact.abs() * 2.0**-8 + 1e-6 * copies.double().abs()[order.places].sum(1)
    assert ((summed.double() - exact).abs() <= close).all()


def test_gradients(order):
    x = torch.randn(TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
    copies = torch.randn(TOKENS * K, WIDTH, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda given: ToCopies.apply(given, order), x)
    assert torch.autograd.gradcheck(lambda given: FromCopies.apply(given, order), copies)


def added_up(*given):
    """`through`, with copies added up here as they are on a GPU; how often they were, too."""
    dispatcher, made = alltoall_dispatcher.AllToAllDispatcher, []
    here, of = dispatcher._adds_up, Order.of
    dispatcher._adds_up = lambda self, hidden: True
    Order.of = lambda *order: made.append(of(*order)) or made[-1]
    try:
        return through(*given), len(made)
    finally:
        dispatcher._adds_up, Order.of = here, of


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("expert", [1, 2])
@pytest.mark.parametrize("dispatcher", ["alltoall", "fp8_alltoall"])
def test_dispatchers_agree(workers, dispatcher, expert, case):
    """Also where ranks exchange them; in FP8, the same layout without."""
    found = workers(2).run(added_up, dispatcher, "grouped", expert, case)
    assert all(times for _, times in found)
    mine = whole([rank for rank, _ in found])
    wanted = expected(case)
    if dispatcher != "alltoall":
        wanted = whole(workers(2).run(through, dispatcher, "grouped", expert, case))
    for name, value in mine.items():
        assert (value - wanted[name]).norm() < 2e-6 * wanted[name].norm(), name


def test_where_copies_are_added_up():
    """On a device, where each token has as many and core moves them itself."""
    plain = {
        "moe_expert_capacity_factor": None,
        "moe_router_padding_for_quantization": False,
        "moe_permute_fusion": False,
    }

    def adds_up(device=True, shared=None, **fields):
        carrier = SimpleNamespace(config=SimpleNamespace(**plain | fields), shared_experts=shared)
        return alltoall_dispatcher.AllToAllDispatcher._adds_up(carrier, SimpleNamespace(is_cuda=device))

    assert adds_up() and not adds_up(device=False) and not adds_up(shared=object())
    assert not any(
        adds_up(**{name: value})
        for name, value in (
            ("moe_expert_capacity_factor", 1.0),
            ("moe_router_padding_for_quantization", True),
            ("moe_permute_fusion", True),
        )
    )
