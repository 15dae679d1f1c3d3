"""The three products of a linear and of grouped experts, against float64 and against the report in NumPy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import report_fp8 as report
import torch

from dsplugins.numerics.tiles import ROW, SQUARE, dequantise, quantise
from dsplugins.numerics.watch import Watch
from dsplugins.plugins.precision.fp8 import products
from dsplugins.plugins.precision.fp8.experts import ExpertsUp, SwigluDown
from dsplugins.plugins.precision.fp8.linear import Fp8Product
from dsplugins.plugins.precision.fp8.reference import Reference, product
from dsplugins.plugins.precision.fp8.rule import ALL, Choice, Rule, rule_for

REFERENCE = Reference()
PLAIN = Rule(REFERENCE)
SHAPES = [(64, 128, 256), (130, 200, 300), (1, 7, 5), (257, 128, 129)]


def drawn(*shape, seed=0, magnitude=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * magnitude


def exact(a, b):
    return dequantise(a).double() @ dequantise(b).double().t()


@pytest.mark.parametrize("tokens, inputs, outputs", SHAPES)
@pytest.mark.parametrize("power_of_two", [False, True])
def test_each_product_is_exact_up_to_fp32_sums(tokens, inputs, outputs, power_of_two):
    """Against float64 on what the operands hold: 1e-6 of the product of their norms."""
    x, w, dy = drawn(tokens, inputs), drawn(outputs, inputs, seed=1), drawn(tokens, outputs, seed=2)
    quantised = {
        "output": (quantise(x, ROW, power_of_two), quantise(w, SQUARE, power_of_two)),
        "input": (quantise(dy, ROW, power_of_two), quantise(w, SQUARE, power_of_two).t),
        "weight": (quantise(dy.t(), ROW, power_of_two), quantise(x.t(), ROW, power_of_two)),
    }
    for name, (a, b) in quantised.items():
        got = product(a, b)
        assert got.dtype == torch.float32
        bound = 1e-6 * torch.outer(dequantise(a).norm(dim=1), dequantise(b).norm(dim=1)).double()
        assert ((got - exact(a, b)).abs() <= bound + 1e-30).all(), name


def weight_gradient(dy, x):
    found = torch.zeros(1, dy.shape[1], x.shape[1])
    products.weight_gradient(dy, x, [len(x)], PLAIN, found)
    return found[0]


@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 1e3])
def test_each_product_is_close_to_bf16s(magnitude):
    """O3: 1 - 2 <x, y> / (|x|^2 + |y|^2) below 1e-3."""
    x = drawn(256, 512, magnitude=magnitude).bfloat16()
    w = drawn(384, 512, seed=1, magnitude=0.02).bfloat16()
    dy = drawn(256, 384, seed=2, magnitude=magnitude).bfloat16()
    forward = products.output(quantise(x, ROW), w, [256], PLAIN, torch.float32)
    assert report.difference(forward, (x @ w.t()).float()) < 1e-3
    gradient = products.input_gradient(quantise(dy, ROW), w, [256], PLAIN, torch.float32)
    assert report.difference(gradient, (dy @ w).float()) < 1e-3
    weight = weight_gradient(dy, x)
    assert report.difference(weight, (dy.t() @ x).float()) < 1e-3


@pytest.mark.parametrize("scales", ["report", "power_of_two"])
@pytest.mark.parametrize("name, routed", [("fc1", False), ("proj", False), ("fc1", True), ("fc2", True)])
@pytest.mark.parametrize("tokens, inputs, outputs", [(40, 130, 150), (129, 256, 128)])
def test_a_linear_is_the_report_s_procedure(name, routed, tokens, inputs, outputs, scales):
    """Forward and backward in float32, against the readable version; the only room is FP32's sums."""
    x, w, dy = drawn(tokens, inputs), drawn(outputs, inputs, seed=1), drawn(tokens, outputs, seed=2)
    x.requires_grad_(), w.requires_grad_()
    y = Fp8Product.apply(x, w, rule_for(name, routed, Choice(scales=scales)), None, None)
    y.backward(dy)
    everywhere = scales == "power_of_two"
    expected = report.linear(
        *(t.detach().numpy() for t in (x, w, dy)),
        input_po2=everywhere or name == "proj" or (name == "fc1" and routed),
        gradient_po2=everywhere or (name == "fc2" and routed),
        weight_po2=everywhere,
        attention_output=name == "proj",
    )
    for got, want in zip((y, x.grad, w.grad), expected, strict=True):
        np.testing.assert_allclose(
            got.detach().double().numpy(), want, rtol=0, atol=2e-6 * np.abs(want).max()
        )


@pytest.mark.parametrize("rounded", ["fprop", "dgrad", "wgrad"])
def test_products_that_are_left_out_take_what_comes(rounded):
    """One of the three in FP8: its result is that of all in FP8, the others are those of plain products."""
    x, w, dy = drawn(129, 256), drawn(130, 256, seed=1), drawn(129, 130, seed=2)

    def results(products):
        leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
        rule = rule_for("fc1", False, Choice(products=products))
        y = Fp8Product.apply(*leaves, rule, None, None)
        y.backward(dy)
        return {"fprop": y.detach(), "dgrad": leaves[0].grad, "wgrad": leaves[1].grad}

    found, everything = results((rounded,)), results(ALL)
    kept = dequantise(quantise(x, ROW)) if rounded == "fprop" else x
    plain = {"fprop": x @ w.t(), "dgrad": dy @ w, "wgrad": dy.t() @ kept}
    for name, value in found.items():
        if name == rounded and rounded != "wgrad":
            assert torch.equal(value, everything[name])
        wanted = plain[name].double()
        error = ((value.double() - wanted).norm() / wanted.norm()).item()
        assert 0.01 < error < 0.06 if name == rounded else error < 1e-6


def test_the_rules_differ_where_they_are_said_to():
    """Power-of-two scales at three places, E5M6 at one, MTP's `eh_proj` in BF16; V3.1: everywhere."""
    powers = {
        (name, routed): rule_for(name, routed, Choice())
        for name in ("q_down_proj", "q_up_proj", "kv_down_proj", "kv_up_proj", "qkv", "proj", "fc1", "fc2")
        for routed in (False, True)
        if routed <= name.startswith("fc")
    }
    assert {key for key, rule in powers.items() if rule.input} == {("proj", False), ("fc1", True)}
    assert {key for key, rule in powers.items() if rule.gradient} == {("fc2", True)}
    assert not any(rule.weight for rule in powers.values())
    assert {key for key, rule in powers.items() if rule.keeps == "e5m6"} == {("proj", False)}
    assert rule_for("mtp_eh_proj", False, Choice()) is None
    assert rule_for("q_up_proj", False, Choice(scales="power_of_two")) == Rule(
        REFERENCE, input=True, gradient=True, weight=True
    )


def test_gradients_have_digits_at_any_size():
    """The mean over more tokens and micro-batches makes them smaller, and changes nothing else."""
    w, x = drawn(128, 256), drawn(64, 256, seed=1)
    results = []
    for size in (1.0, 2.0**-60):
        dy = drawn(64, 128, seed=2) * size
        codes = products.gradient(dy, PLAIN)
        results.append(products.input_gradient(codes, w, [64], PLAIN, torch.float32) / size)
        results.append(weight_gradient(dy, x) / size)
    assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[3])


SPLITS = [40, 0, 130, 1]


def test_grouped_experts_are_one_linear_each():
    """Ragged runs of tokens, one of them empty; bit for bit."""
    rule = rule_for("fc1", True, Choice())
    x, w, dy = drawn(sum(SPLITS), 130), drawn(4, 150, 130, seed=1), drawn(sum(SPLITS), 150, seed=2)
    a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
    y = ExpertsUp.apply(a, b, SPLITS, rule)
    y.backward(dy)
    start = 0
    for expert, count in enumerate(SPLITS):
        rows = slice(start, start := start + count)
        one, weight = x[rows].clone().requires_grad_(), w[expert].clone().requires_grad_()
        alone = Fp8Product.apply(one, weight, rule, None, None)
        alone.backward(dy[rows])
        assert torch.equal(y[rows], alone) and torch.equal(a.grad[rows], one.grad)
        assert torch.equal(b.grad[expert], weight.grad)


@pytest.mark.parametrize("scales", ["report", "power_of_two"])
def test_the_experts_down_projection_is_the_reports(scales):
    """SwiGLU's input is kept in E4M3 and its output made again from that; the rest as any linear."""
    inner, probs = drawn(60, 260), torch.rand(60, generator=torch.Generator().manual_seed(3))
    w, dy = drawn(128, 130, seed=1), drawn(60, 128, seed=2)
    leaves = [t.clone().requires_grad_() for t in (inner, probs, w)]
    y = SwigluDown.apply(*leaves, [60], rule_for("fc2", True, Choice(scales=scales)))
    y.backward(dy)

    everywhere = scales == "power_of_two"
    wanted, dactive, kept, dw = report.down(
        *(t.numpy() for t in (inner, probs, w, dy)), everywhere, gradient_po2=True, weight_po2=everywhere
    )
    through = torch.tensor(kept, requires_grad=True)
    scale = probs.double().requires_grad_()
    gate, up = through.chunk(2, dim=-1)
    (torch.nn.functional.silu(gate) * up * scale[:, None]).backward(torch.tensor(dactive))
    found = y.detach(), *(leaf.grad for leaf in leaves)
    for got, want in zip(found, map(torch.as_tensor, (wanted, through.grad, scale.grad, dw)), strict=True):
        assert (got.double() - want).abs().max() <= 1e-5 * want.abs().max()


def test_weight_gradients_are_summed_unrounded():
    """Two micro-batches into `main_grad`: FP32 sums that BF16 can't hold, and autograd's own is ignored."""
    weight = torch.nn.Parameter(drawn(64, 128, seed=1).bfloat16())
    weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(64, 128), False
    sums = torch.zeros(64, 128)
    for seed in (5, 6):
        x = drawn(32, 128, seed=seed).bfloat16().requires_grad_()
        dy = drawn(32, 64, seed=seed + 10).bfloat16()
        Fp8Product.apply(x, weight, PLAIN, None, None).backward(dy)
        seen = dequantise(quantise(x.detach(), ROW))
        sums += weight_gradient(dy, seen)
    assert weight.grad_added_to_main_grad
    assert torch.equal(weight.main_grad, sums)
    assert not torch.equal(sums, sums.bfloat16().float())


def test_nothing_is_kept_or_watched_where_no_backward_follows():
    """Evaluation, and the first of two forward passes under recomputation."""
    watch = Watch()
    seen = []
    watch.look = lambda operand, *_: seen.append(operand)
    rule = replace(rule_for("proj", False, Choice()), watch=watch)
    assert rule.now() is rule and rule.keeps == "e5m6"
    x, w = drawn(32, 128), drawn(64, 128, seed=1).requires_grad_()
    with_backward = Fp8Product.apply(x, w, rule.now(), None, None)
    assert seen == ["fprop.x", "fprop.w"] and len(with_backward.grad_fn.saved_tensors) == 2
    with torch.no_grad():
        assert rule.now() is rule.forward_only
        assert torch.equal(Fp8Product.apply(x, w, rule.now(), None, None), with_backward)
        inner = drawn(32, 256)
        SwigluDown.apply(inner, None, w, [32], rule.now())
    assert len(seen) == 2


@pytest.mark.parametrize("name, bytes_each", [("fc1", 1 + 4 / 128), ("proj", 1.5 + 4 / 128)])
def test_what_a_linear_keeps_for_backward_in_bytes(name, bytes_each):
    """Of BF16's two: codes and a scale for each 128; after attention three bytes for two numbers."""
    x, w = drawn(64, 256).bfloat16().requires_grad_(), drawn(32, 256, seed=1).requires_grad_()
    y = Fp8Product.apply(x, w, rule_for(name, False, Choice()), None, None)
    kept = y.grad_fn.saved_tensors
    assert sum(t.numel() * t.element_size() for t in kept) == 64 * 256 * bytes_each


def test_what_an_expert_keeps_for_backward_in_bytes():
    """SwiGLU's input in a byte a number, and the router's weight; nothing of what comes out of it."""
    inner, probs = drawn(64, 512).bfloat16().requires_grad_(), torch.rand(64)
    w = drawn(32, 256, seed=1).requires_grad_()
    y = SwigluDown.apply(inner, probs, w, [64], rule_for("fc2", True, Choice()))
    kept = y.grad_fn.saved_tensors
    assert sum(t.numel() * t.element_size() for t in kept) == 64 * (512 * (1 + 4 / 128) + 4)


SQUARES = {2.0**4: (1.0, 1.1), 2.0**10: (1.0, 1.1), 2.0**14: (1.5, 2.5), 2.0**16: (5.0, 10.0)}
"""How much larger some tokens' gradients are -> bounds of square tiles' error over that of rows."""


@pytest.mark.parametrize("larger", SQUARES)
def test_square_tiles_for_gradients_hurt_where_outliers_follow_tokens(larger):
    """The report's negative result (appendix B.2): 128 x 128 for the gradient's tiles diverged.

    E4M3 spans 2^18, its normal numbers 2^15: tokens whose gradients are as many times larger push the others
    of their square tile out of it. With a scale for each token nobody notices; nor with smaller ones.
    """
    dy, w = drawn(512, 256), drawn(256, 512, seed=1, magnitude=0.05)
    dy[::64] *= larger
    ordinary = torch.ones(512, dtype=torch.bool)
    ordinary[::64] = False
    true = dy.double() @ w.double()

    def error(tile):
        got = product(quantise(dy, tile), quantise(w, SQUARE).t)
        return ((got - true)[ordinary].norm() / true[ordinary].norm()).item()

    by_row, by_square = error(ROW), error(SQUARE)
    low, high = SQUARES[larger]
    assert by_row < 0.05 and low * by_row < by_square < high * by_row
