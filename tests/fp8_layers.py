"""FP8 layers forward and backward on ragged runs of tokens, by one arithmetic beside another."""

from __future__ import annotations

import torch

SPLITS = [40, 0, 131, 128]
TOKENS = sum(SPLITS)


def drawn(*shape, seed=0, magnitude=1.0, device="cpu"):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * magnitude
    return values.bfloat16().to(device)


def through(function, leaves, *others):
    """Output and gradients of `function`, with a gradient of the output that was drawn."""
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    y = function.apply(*leaves, *others)
    y.backward(drawn(*y.shape, seed=9, device=y.device))
    return [y.detach(), *(leaf.grad for leaf in leaves)]


def alike(found, expected, digits=2**-7):
    """The same codes; sums in another order, rounded to BF16 then: a last digit."""
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        scale = other.float().abs().max()
        assert ((one.float() - other.float()).abs() <= digits * other.float().abs() + 1e-5 * scale).all()


def errors(found, expected):
    """|found - expected| / |expected| of each."""
    pairs = zip(found, expected, strict=True)
    return [float((one.float() - other.float()).norm() / other.float().norm()) for one, other in pairs]
