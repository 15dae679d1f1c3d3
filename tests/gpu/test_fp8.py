"""FP8 on Hopper: each backend beside the reference, and the tiny recipe in every format."""

from __future__ import annotations

import importlib.util

import pytest

RECIPE = "deepseek_v3/tiny_gpu.yaml"
STEPS = 5
SHORT = (f"train.steps={STEPS}", "evaluate.sequences=8", "plugins.expert_load=null", "plugins.curves=null")
REFERENCE = ("plugins.bf16=null", "plugins.fp8_v3={}")
TE = (
    *("plugins.torch_local=null", "plugins.te={}", "plugins.bf16=null"),
    *("plugins.grouped=null", "plugins.sequential={}"),
)
# Of a product, relative to the reference's: rounding to BF16 is 2e-3; within 128 numbers Hopper's tensor
# cores sum with some 14 bits (report, 3.3.2). A tile or an expert that is mixed up is 1e-1 and more.
PRODUCT = 3e-3
# Of a loss, relative: the first two steps see the initial weights, where only products differ; later, codes.
LOSSES = (1e-3, 1e-3, 1e-2, 1e-2, 1e-2)
SHAPES = {"few": (1, 576, 1536), "ragged": (3, 208, 144), "experts": (4, 1024, 512)}


def losses(overrides):
    from runs import trained

    return [row["loss"] for row in trained([*SHORT, *overrides], RECIPE)["rows"]]


def apart(mine, theirs):
    return [abs(a - b) / b for a, b in zip(mine, theirs, strict=True)]


def product_errors(arithmetic, device, tokens):
    """Of each shape and product, relative to the reference on the same numbers."""
    from dsplugins.plugins.precision.fp8 import measure

    rows = measure.rates(arithmetic, SHAPES, tokens, device, lambda call: [float(call() is not None)])
    return {(row["linear"], row["product"]): row["error"] for row in rows}


def test_the_checks_hold_for_the_reference_on_the_cpu():
    import torch

    from dsplugins.plugins.precision.fp8.reference import Reference

    found = product_errors(Reference(), torch.device("cpu"), 48)
    assert len(found) == 9 and set(found.values()) == {0.0}


def hopper(backend):
    """Skip, by name, what this machine lacks for it."""
    from dsplugins.plugins.precision.fp8.needs import of_machine

    for problem in of_machine(backend):
        pytest.skip(problem.message)


def chosen(backend):
    from dsplugins.plugins.precision.fp8.backends import arithmetic

    hopper(backend)
    return arithmetic(backend)


@pytest.mark.gpu
@pytest.mark.parametrize("power_of_two", [False, True])
def test_casts_are_the_reference_s_to_the_bit(nccl, power_of_two):
    import torch

    from dsplugins.plugins.precision.fp8.reference import Reference

    casts, reference = chosen("torch"), Reference()
    x = torch.randn(777, 1040, device=nccl).bfloat16() * torch.logspace(-9, 4, 1040, device=nccl)
    x[5, 3], x[700, 900], x[64] = torch.nan, torch.inf, 0
    x, splits = x.bfloat16(), [300, 0, 477]
    pairs = [
        (casts.rows(x, power_of_two), reference.rows(x, power_of_two)),
        *zip(casts.columns(x, splits, power_of_two), reference.columns(x, splits, power_of_two), strict=True),
        *(
            (casts.blocks(x[None], power_of_two, turned), reference.blocks(x[None], power_of_two, turned))
            for turned in (False, True)
        ),
        *zip(
            casts.columns(reference.rows(x, True), splits, power_of_two),
            reference.columns(reference.rows(x, True), splits, power_of_two),
            strict=True,
        ),
        *zip(
            casts.columns(x.float(), splits, power_of_two),
            reference.columns(x.float(), splits, power_of_two),
            strict=True,
        ),
    ]
    for found, expected in pairs:
        assert torch.equal(found.scales.nan_to_num(-1.0), expected.scales.nan_to_num(-1.0))
        assert torch.equal(found.codes.float().nan_to_num(-1.0), expected.codes.float().nan_to_num(-1.0))


@pytest.mark.gpu
def test_tables_of_experts_runs_are_sent_without_waiting(nccl):
    """torch raises where the host would wait for the device."""
    import torch

    from dsplugins.plugins.precision.fp8.host_tables import sent

    table, before = torch.arange(4096, dtype=torch.int32), torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        there = sent(table, nccl)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert torch.equal(there.cpu(), table)


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [1040, 1043])
def test_e5m6_is_the_reference_s_to_the_bit(nccl, channels):
    """In words of 32 bits, and byte by byte."""
    import torch

    from dsplugins.plugins.precision.fp8.reference import Reference

    casts, reference = chosen("torch"), Reference()
    x = (torch.randn(777, channels, device=nccl) * torch.logspace(-9, 4, channels, device=nccl)).bfloat16()
    found, expected = casts.pack(x), reference.pack(x)
    assert torch.equal(found.scales, expected.scales) and torch.equal(found.bytes, expected.bytes)
    assert torch.equal(casts.unpack(found), reference.unpack(expected))


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [1152, 1040])
def test_swiglu_and_its_way_back_are_the_reference_s(nccl, channels):
    """To a code in a thousand: an exponential's last digit may round the other way."""
    import torch

    from dsplugins.plugins.precision.fp8.reference import Reference
    from dsplugins.plugins.precision.fp8.swiglu import SwigluKept

    casts, reference, splits = chosen("torch"), Reference(), [300, 0, 477]
    inner = (3 * torch.randn(777, 2 * channels, device=nccl)).bfloat16()
    probs, dy = torch.rand(777, device=nccl), torch.randn(777, channels, device=nccl).bfloat16()
    rows = [one.swiglu_rows(inner, probs, True) for one in (casts, reference)]
    kept = SwigluKept(reference.rows(inner, False), probs, torch.bfloat16)
    columns = [one.swiglu_columns(kept, splits, False) for one in (casts, reference)]
    for one, other in [rows, *zip(*columns, strict=True)]:
        assert (one.codes.float() != other.codes.float()).sum() <= 1e-3 * one.codes.numel()
    for one, other in zip(*(each.swiglu_gradient(kept, dy) for each in (casts, reference)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2 * float(other.float().abs().mean()))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torch", "deepgemm"])
def test_weight_gradients_of_full_tiles_repeat_themselves(nccl, backend):
    """Experts of exactly 128 tokens and a channel of zeros: DeepGEMM's issue 365 has a kernel that then
    gives something else now and then."""
    import torch

    from dsplugins.plugins.precision.fp8.reference import Reference

    arithmetic, splits = chosen(backend), [256, 128, 128, 256]
    x, dy = (torch.randn(sum(splits), 2048, device=nccl).bfloat16() for _ in range(2))
    x[256:384, 7] = 0
    both = [[one.columns(t, splits, False) for t in (dy, x)] for one in (arithmetic, Reference())]
    exact = torch.zeros(4, 2048, 2048, device=nccl)
    Reference().weight_gradient(*both[1], exact)
    first = None
    for _ in range(300):
        sums = torch.zeros_like(exact)
        arithmetic.weight_gradient(*both[0], sums)
        first = sums if first is None else first
        assert torch.equal(sums, first)
    assert (first - exact).norm() < PRODUCT * exact.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [7168, 1040, 1043])
def test_a_payload_is_the_cpu_s_to_the_bit(nccl, channels):
    import torch

    from dsplugins.plugins.dispatcher.fp8_payload import pack, unpack

    x = (torch.randn(777, channels) * torch.logspace(-9, 4, channels)).bfloat16()
    x[0, 3], x[64] = torch.inf, 0
    here, there = pack(x), pack(x.to(nccl))
    assert torch.equal(here[1:], there[1:].cpu())  # a NaN has several codes
    back, wanted = unpack(there, channels, torch.bfloat16).cpu(), unpack(here, channels, torch.bfloat16)
    assert torch.equal(back.nan_to_num(-1.0), wanted.nan_to_num(-1.0))


@pytest.mark.gpu
def test_tokens_are_packed_for_their_way_on_a_gpu(nccl, deterministic):
    """One GPU has no other to send to; what the dispatcher does before and after is done."""
    import torch

    here = losses(["plugins.bf16=null", "plugins.fp8_v3={}"])
    there = losses(
        ["plugins.bf16=null", "plugins.fp8_v3={}", "plugins.alltoall=null", "plugins.fp8_alltoall={}"]
    )
    assert torch.isfinite(torch.tensor(there)).all() and apart(there, here)[0] < 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torch", "deepgemm"])
@pytest.mark.parametrize("tokens", [48, 512])
def test_products_are_the_reference_s(nccl, backend, tokens):
    found = product_errors(chosen(backend), nccl, tokens)
    assert len(found) == 9 and max(found.values()) < PRODUCT, found


def layers(arithmetic, device, widths):
    """Outputs and gradients of a linear, one whose input is kept in E5M6, and experts; by name."""
    import torch
    from fp8_layers import SPLITS, TOKENS, drawn, through

    from dsplugins.plugins.precision.fp8.experts import ExpertsUp, SwigluDown
    from dsplugins.plugins.precision.fp8.linear import Fp8Product
    from dsplugins.plugins.precision.fp8.rule import Rule

    inputs, outputs = widths
    x, one = drawn(TOKENS, inputs, device=device), drawn(outputs, inputs, seed=1, device=device)
    inner = drawn(TOKENS, 2 * inputs, seed=2, device=device)
    probs = torch.rand(TOKENS, generator=torch.Generator().manual_seed(3)).to(device)
    weights = drawn(len(SPLITS), outputs, inputs, seed=4, device=device)
    plain, powers = Rule(arithmetic), Rule(arithmetic, input=True, keeps="e5m6")
    return {
        "linear": through(Fp8Product, (x, one), plain, None, None),
        "after attention": through(Fp8Product, (x, one), powers, None, None),
        "up": through(ExpertsUp, (x, weights), SPLITS, plain),
        "down": through(SwigluDown, (inner, probs, weights), SPLITS, plain),
    }


def layer_errors(arithmetic, device, widths):
    from fp8_layers import errors

    from dsplugins.plugins.precision.fp8.reference import Reference

    found, expected = (layers(one, device, widths) for one in (arithmetic, Reference()))
    return {name: errors(found[name], expected[name]) for name in found}


# One tile of inputs, less than one, several with a part of one at the end.
WIDTHS = [(96, 160), (128, 160), (576, 208)]


@pytest.mark.parametrize("widths", WIDTHS)
def test_the_layers_of_the_reference_are_themselves(widths):
    import torch

    from dsplugins.plugins.precision.fp8.reference import Reference

    found = layer_errors(Reference(), torch.device("cpu"), widths)
    assert {name: sum(each) for name, each in found.items()} == dict.fromkeys(found, 0.0)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torch", "deepgemm"])
@pytest.mark.parametrize("widths", WIDTHS)
def test_layers_are_the_reference_s_on_ragged_runs(nccl, backend, widths):
    """299 tokens, one expert of four without any: forward and backward."""
    found = layer_errors(chosen(backend), nccl, widths)
    assert max(map(max, found.values())) < PRODUCT, found


@pytest.mark.gpu
def test_the_reference_makes_the_same_codes_on_both_devices(nccl):
    import torch

    from dsplugins.plugins.precision.fp8.reference import Reference

    x = torch.randn(300, 1040).bfloat16() * torch.logspace(-9, 4, 1040)
    for power_of_two in (False, True):
        here, there = (Reference().rows(one, power_of_two) for one in (x, x.to(nccl)))
        assert torch.equal(here.scales, there.scales.cpu())
        assert torch.equal(here.codes.float(), there.codes.float().cpu())


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torch", "deepgemm"])
def test_trains_as_the_reference(nccl, backend):
    hopper(backend)
    mine = losses(["plugins.bf16=null", f"plugins.fp8_v3={{backend: {backend}}}"])
    differences = apart(mine, losses(REFERENCE))
    assert all(one <= bound for one, bound in zip(differences, LOSSES, strict=True)), differences


@pytest.fixture
def te():
    if importlib.util.find_spec("transformer_engine") is None:
        pytest.skip("transformer_engine is not installed here")


@pytest.mark.gpu
def test_the_plugins_of_the_671b_recipe_train_as_the_reference(nccl, te):
    """v3_671b_fp8.yaml's: FP8 on top of TransformerEngine's norms and attention, tokens sent in FP8, with
    recomputation."""
    hopper("deepgemm")
    mine = losses(
        [
            *("plugins.torch_local=null", "plugins.te={}"),
            *("plugins.bf16=null", "plugins.fp8_v3={backend: deepgemm}"),
            *("plugins.alltoall=null", "plugins.fp8_alltoall={}"),
            "plugins.v3_recompute={norms: true, mla_up_proj: true}",
        ]
    )
    differences = apart(mine, losses(REFERENCE))
    assert all(one <= bound for one, bound in zip(differences, LOSSES, strict=True)), differences


def reached(overrides):
    """(linears of TransformerEngine that multiplied in FP8, all of them, losses)."""
    from runs import assembled

    from dsplugins.step import Progress, take_step

    with assembled([*SHORT, *overrides], RECIPE) as run:
        progress, found = Progress(), []
        for _ in range(STEPS):
            step = take_step(run, progress)
            progress = progress.after(step)
            found.append(step.loss)
        modules = [m for chunk in run.chunks for m in chunk.modules() if hasattr(m, "fp8_initialized")]
        linears = [m for m in modules if "Linear" in type(m).__name__]
        return sum(bool(m.fp8) for m in linears), len(linears), found


@pytest.mark.gpu
def test_te_blockwise_multiplies_in_fp8(nccl, te):
    """Every linear of TransformerEngine, but MTP's `eh_proj` and what core keeps out of its autocast."""
    quantised, linears, found = reached([*TE, "plugins.te_blockwise={}"])
    assert quantised and linears - quantised <= 1, (quantised, linears)
    assert max(apart(found, losses(()))) < 2e-2


@pytest.mark.gpu
def test_te_mxfp8_is_refused_on_hopper(te):
    import torch

    from dsplugins.contracts import RecipeError

    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("this GPU is not Hopper")
    with pytest.raises(RecipeError) as told:
        losses([*TE, "plugins.te_mxfp8={}", "model.kv_lora_rank=48"])
    assert "Hopper (sm_90) has no MXFP8" in str(told.value)
