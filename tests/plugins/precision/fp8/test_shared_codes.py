"""Linears that read one tensor share its cast: made once, kept once, and by nobody else."""

from __future__ import annotations

import weakref
from dataclasses import replace
from unittest import mock

import pytest
import torch

from dsplugins.numerics.watch import Watch
from dsplugins.plugins.precision.fp8.linear import Fp8Product
from dsplugins.plugins.precision.fp8.reference import Reference
from dsplugins.plugins.precision.fp8.rule import Choice, rule_for

Q, KV = (rule_for(name, False, Choice()) for name in ("q_down_proj", "kv_down_proj"))


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


WEIGHTS = [drawn(48, 160, seed=seed).requires_grad_() for seed in (1, 2)]


@pytest.fixture
def casts():
    """What `rows` was given."""
    given, own = [], Reference.rows

    def noting(self, x, *more):
        given.append(x.shape)
        return own(self, x, *more)

    with mock.patch.object(Reference, "rows", noting):
        yield given


def both(x, rules=(Q, KV), between=lambda x: None):
    """Outputs of two linears that read x [S, B, K]."""
    first = Fp8Product.apply(x, WEIGHTS[0], rules[0].now(), None, None)
    between(x)
    return first, Fp8Product.apply(x, WEIGHTS[1], rules[1].now(), None, None)


def kept(outputs):
    """Where the codes and scales lie that backward has."""
    return [[t.untyped_storage().data_ptr() for t in y.grad_fn.saved_tensors] for y in outputs]


def gradients(x, outputs):
    found = torch.autograd.grad(sum(y.square().sum() for y in outputs), [x, *WEIGHTS])
    return [t.clone() for t in (*outputs, *found)]


def test_one_cast_is_made_and_kept_and_no_bit_is_another(casts):
    x = drawn(6, 2, 160).requires_grad_()
    shared = both(x)
    assert casts == [(12, 160)]
    first, second = kept(shared)
    assert first == second
    apart = both(x, between=lambda _: Fp8Product.apply(drawn(1, 160), WEIGHTS[0], Q, None, None))
    assert casts == [(12, 160), (1, 160), (12, 160)] and len({*map(tuple, kept(apart))}) == 2
    for got, want in zip(gradients(x, shared), gradients(x, apart), strict=True):
        assert torch.equal(got, want)


def test_whoever_watches_sees_both():
    seen, values = {}, drawn(6, 2, 160)
    rules = [replace(rule, watch=Watch()) for rule in (Q, KV)]
    for name, rule in zip("ab", rules, strict=True):
        rule.watch.look = lambda operand, x, made, name=name: seen.setdefault((name, operand), (x, made))
    both(values.requires_grad_(), rules)
    (x, made), (same, its) = seen["a", "fprop.x"], seen["b", "fprop.x"]
    assert torch.equal(x, same) and made.codes is its.codes


def test_numbers_that_were_written_to_are_cast_again(casts):
    x = drawn(6, 2, 160)
    _, y = both(x, between=lambda x: x.mul_(2))
    assert len(casts) == 2
    assert torch.equal(y, Fp8Product.apply(x.clone(), WEIGHTS[1], KV, None, None))


def test_other_scales_and_other_parts_are_other_codes(casts):
    both(drawn(6, 2, 160), (Q, rule_for("kv_down_proj", False, Choice(scales="power_of_two"))))
    x = drawn(12, 2, 160)
    for part in (x[:6], x[6:]):
        Fp8Product.apply(part, WEIGHTS[0], Q, None, None)
    assert len(casts) == 4


def test_nothing_lives_longer_than_backward_needs_it(casts):
    """And memory that comes again after that is no input that is known."""
    for _ in range(3):
        outputs = both(drawn(6, 2, 160))
        codes = weakref.ref(outputs[0].grad_fn.saved_tensors[0])
        assert codes() is not None
        del outputs
        assert codes() is None
    assert len(casts) == 3
    with torch.no_grad():
        both(drawn(6, 2, 160))
    assert len(casts) == 5, "nobody keeps any"
    with torch.inference_mode():
        both(drawn(6, 2, 160))


def test_micro_batches_in_flight_have_their_own():
    xs = [drawn(6, 2, 160, seed=seed).requires_grad_() for seed in (5, 6)]
    alone = [gradients(x, both(x)) for x in xs]
    flying = [both(x) for x in xs]
    for x, outputs, wanted in zip(xs, flying, alone, strict=True):
        assert all(map(torch.equal, gradients(x, outputs), wanted))


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_shares_its_own(casts, reentrant):
    """Core's is the re-entrant one: nothing is kept of the first pass. The other one's hooks keep copies."""
    from torch.utils.checkpoint import checkpoint

    leaf = drawn(6, 2, 160).requires_grad_()
    wanted = gradients(leaf, both(leaf))[2]
    casts.clear()
    outputs = checkpoint(both, leaf, use_reentrant=reentrant)
    sum(y.square().sum() for y in outputs).backward()
    assert torch.equal(leaf.grad, wanted)
    assert not reentrant or casts.count((12, 160)) == 2 + 1
    WEIGHTS[0].grad = WEIGHTS[1].grad = None


def attention_casts():
    """How often the input of a layer's two down-projections is cast."""
    from built import tiny_model

    with tiny_model("plugins.fp32=null", "plugins.fp8_v3={}") as (_, _, _, (chunk,)):
        attention, given, own = chunk.decoder.layers[1].self_attention.float(), [], Reference.rows

        def noting(self, x, *more):
            given.append(own(self, x, *more))
            return given[-1]

        x = torch.randn(8, 2, 32).requires_grad_()
        with mock.patch.object(Reference, "rows", noting):
            outputs = [down(x)[0] for down in (attention.linear_q_down_proj, attention.linear_kv_down_proj)]
            sum(y.sum() for y in outputs).backward()
        return sum(one.codes.shape[1] == 32 for one in given)


def test_in_attention_core_passes_the_input_on_as_another_object(workers):
    """`copy_to_tensor_model_parallel_region` makes one for each linear; the numbers are the same."""
    assert workers(1).run(attention_casts) == [1]
