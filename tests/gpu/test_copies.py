"""Copies of tokens added up by torch's kernel for a GPU: rounded once, the same bits twice."""

from __future__ import annotations

import pytest

TOKENS, K, WIDTH = 512, 8, 7168


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, unit", [("bfloat16", 2.0**-8), ("float32", 2.0**-23)])
def test_sums_are_rounded_once(nccl, dtype, unit):
    import torch

    from dsplugins.plugins.dispatcher.copies import FromCopies, Order, ToCopies

    generator = torch.Generator(nccl).manual_seed(0)
    shuffled = torch.arange(TOKENS, device=nccl).repeat(K)
    order = Order.of(shuffled[torch.randperm(TOKENS * K, generator=generator, device=nccl)], K)
    copies = torch.randn(TOKENS * K, WIDTH, generator=generator, device=nccl).to(getattr(torch, dtype))
    parts = copies.double()[order.places]
    bound = parts.sum(1).abs() * unit + K * 2.0**-23 * parts.abs().sum(1)
    x = torch.zeros(TOKENS, WIDTH, dtype=copies.dtype, device=nccl, requires_grad=True)
    ToCopies.apply(x, order).backward(copies)
    for summed in (FromCopies.apply(copies, order), x.grad):
        assert summed.dtype == copies.dtype
        assert ((summed.double() - parts.sum(1)).abs() <= bound).all()
        assert torch.equal(summed, order.summed(copies))
