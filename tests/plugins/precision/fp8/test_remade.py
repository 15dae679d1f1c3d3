"""A linear whose input is made again for backward keeps neither its numbers nor its codes."""

from __future__ import annotations

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from dsplugins.numerics import remade
from dsplugins.plugins.precision.fp8.linear import Fp8Product
from dsplugins.plugins.precision.fp8.rule import ALL, Choice, rule_for

FP8 = ["plugins.fp32=null", "plugins.bf16=null", "plugins.fp8_v3={}"]
RECOMPUTED = ["plugins.v3_recompute={mla_up_proj: false}"]


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


WEIGHT = drawn(48, 160, seed=1).requires_grad_()


def noted(x):
    memory = StorageWeakRef(x.untyped_storage())
    remade.note(memory)
    return memory


def product(x, rule):
    return Fp8Product.apply(x, WEIGHT, rule.now(), None, None)


def gradients(x, y):
    return [y, *torch.autograd.grad(y.square().sum(), [x, WEIGHT])]


@pytest.mark.parametrize("products", [ALL, ("fprop", "dgrad"), ("dgrad",)])
@pytest.mark.parametrize("linear", ["fc1", "proj"])
def test_no_bit_is_another(linear, products):
    """Rows and E5M6 alike, and where some product takes no codes; the input is gone in between."""
    rule = rule_for(linear, False, Choice(products=products))
    x = drawn(6, 2, 160).requires_grad_()
    wanted = gradients(x, product(x, rule))
    numbers, memory = x.detach().clone(), noted(x)
    y = product(x, rule)
    remade.forget(memory)
    (saved,) = y.grad_fn.saved_tensors
    assert saved.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    x.data.zero_()
    x.data.copy_(numbers)
    assert all(map(torch.equal, gradients(x, y), wanted))


def test_only_what_is_noted_is_kept_as_it_is():
    """Not what was given back or left alone since, not a copy of it."""
    rule, x = rule_for("fc1", False, Choice()), drawn(6, 2, 160)
    memory = noted(x)
    copied = product(x.transpose(0, 1), rule)  # no view has all tokens one after the other
    remade.forget(memory)
    for y in (copied, product(x, rule)):
        codes, _ = y.grad_fn.saved_tensors
        assert codes.dtype == torch.float8_e4m3fn


def kept_codes(overrides):
    """(tokens of inputs as wide as the model whose codes are kept, of all that are cast): one micro-batch."""
    from unittest import mock

    from runs import assembled

    from dsplugins.plugins.precision.fp8.reference import Reference
    from dsplugins.step import Progress, take_step

    kept, cast, own = [], [], Reference.rows

    def noting(self, x, *more):
        if x.shape[-1] == 48 and len(more) == 1:  # of a gradient, its floor is given, too
            cast.append(x.shape[0])
        return own(self, x, *more)

    one = ["train.micro_batch=2", "train.global_batch=2", "model.hidden_size=48"]
    keeping = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with assembled([*one, *FP8, *overrides]) as run, mock.patch.object(Reference, "rows", noting), keeping:
        take_step(run, Progress())
    wide = [t for t in kept if t.dtype == torch.float8_e4m3fn and t.shape[-1] == 48]
    return [t.shape[0] for t in wide], cast


LAYOUTS = {
    "one": (1, [], 64, 5),
    "tp2": (2, ["parallel.tensor=2"], 32, 5),
    "pp2": (2, ["parallel.pipeline=2"], 64, 2),
}
"""Ranks, overrides, tokens that a rank has, layers of rank 0."""


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_model_keeps_codes_of_dispatched_tokens_only(workers, layout):
    """Without recomputation also of what MLA's two down-projections and the dense or shared experts read.

    Those two inputs of a layer are cast once forward, and once more backward where they are made again.
    """
    size, overrides, tokens, layers = LAYOUTS[layout]
    (kept, cast), (less, again) = (
        workers(size).run(kept_codes, [*overrides, *more])[0] for more in ([], RECOMPUTED)
    )
    assert kept.count(tokens) == 3 * layers and less.count(tokens) == 0
    assert [rows for rows in kept if rows != tokens] == [rows for rows in less if rows != tokens]
    assert (cast.count(tokens), again.count(tokens)) == (2 * layers, 4 * layers)
