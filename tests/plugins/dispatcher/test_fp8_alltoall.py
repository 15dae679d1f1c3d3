"""Tokens that travel in FP8: rounded as the report says, a byte for each number, 16 bits on the way back."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import report_fp8 as report
import torch
from oracles.dispatch import CASES, EXPERTS, expected, through, whole
from runs import SEQUENTIAL

from dsplugins.contracts import Layout
from dsplugins.plugins.dispatcher.fp8_alltoall import Fp8AllToAll


def rounded(x):
    """By the NumPy procedure: tiles of 128 channels of a token, power-of-two scales."""
    flat = x.reshape(-1, x.shape[-1]).numpy()
    return torch.from_numpy(report.coded(flat, 1, 128, power_of_two=True)).float().view(x.shape)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("expert", [1, 2])
def test_layouts_agree_and_are_the_plain_sum_of_what_was_rounded(workers, expert, experts, case):
    ranks = workers(2).run(through, "fp8_alltoall", experts, expert, case)
    wanted = expected(case, rounded)
    for name, value in whole(ranks).items():
        assert (value - wanted[name]).norm() < 2e-6 * wanted[name].norm(), name
    exact = expected(case)
    assert all((wanted[name] - exact[name]).norm() > 1e-3 * exact[name].norm() for name in exact)


@pytest.mark.parametrize("expert", [1, 2])
def test_gradients_of_v3_s_batch_are_rounded_as_large_ones(workers, expert):
    """The mean over its 63 million tokens makes them far smaller than 1e-4: no floor for them."""
    size = 2.0**-40
    ranks = whole(workers(2).run(through, "fp8_alltoall", "grouped", expert, "spread", 1, size))
    wanted = expected("spread", rounded)
    for name in ("tokens", "probs"):
        assert (ranks[name] / size - wanted[name]).norm() < 2e-6 * wanted[name].norm(), name


@pytest.fixture(params=["torch", "triton"])
def payload(request):
    """pack and unpack, as on a CPU and as on CUDA."""
    from dsplugins.plugins.dispatcher import fp8_payload

    if request.param == "torch":
        return fp8_payload.pack, fp8_payload.unpack
    pytest.importorskip("triton")
    request.getfixturevalue("interpreted")
    from dsplugins.plugins.dispatcher import payload_casts

    return payload_casts.pack, payload_casts.unpack


@pytest.mark.parametrize("shape", [(5, 128), (3, 130), (0, 128), (1, 7), (40, 1016), (2, 7168)])
def test_a_row_is_its_codes_and_an_exponent_for_each_tile(payload, shape):
    from dsplugins.numerics.tiles import SMALLEST_AMAX
    from dsplugins.plugins.dispatcher import fp8_payload

    pack, unpack = payload
    x = (torch.randn(shape) * torch.logspace(-9, 9, shape[0]).unsqueeze(1)).bfloat16()
    packed = pack(x, SMALLEST_AMAX)
    assert torch.equal(packed, fp8_payload.pack(x))
    assert packed.dtype == torch.uint8 and packed.shape == (shape[0], shape[1] + -(-shape[1] // 128))
    back = unpack(packed, shape[1], torch.float32)
    assert torch.equal(back, rounded(x.float())) or not x.numel()
    half = unpack(packed, shape[1], torch.bfloat16)
    assert torch.equal(back, half.float()), "BF16 holds what arrives"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_arrives_as_such(payload, bad):
    from dsplugins.numerics.tiles import SMALLEST_AMAX

    pack, unpack = payload
    x = torch.ones(2, 256)
    x[0, 5] = bad
    back = unpack(pack(x, SMALLEST_AMAX), 256, torch.float32)
    assert not back[0, 5].isfinite() and torch.equal(back[1], x[1]) and torch.equal(back[0, 128:], x[0, 128:])


def test_small_gradients_keep_their_digits(payload):
    """A gradient is as small as the batch is large: no floor at 1e-4 for them."""
    from dsplugins.numerics.tiles import SMALLEST_GRADIENT

    pack, unpack = payload
    x = torch.randn(4, 128, generator=torch.Generator().manual_seed(0))
    small, same = (
        unpack(pack(x * factor, SMALLEST_GRADIENT), 128, torch.float32) for factor in (2.0**-40, 1.0)
    )
    assert torch.equal(small * 2.0**40, same)


def test_half_of_the_bytes_there_and_three_quarters_together(single):
    """At V3's width, beside BF16."""
    from dsplugins.plugins.dispatcher.alltoall_dispatcher import AllToAllDispatcher
    from dsplugins.plugins.dispatcher.fp8_exchange import Fp8AllToAllDispatcher

    config = SimpleNamespace(config=SimpleNamespace(hidden_size=7168))
    there, half = (kind.dispatched_bytes(config, 2) for kind in (Fp8AllToAllDispatcher, AllToAllDispatcher))
    assert there / half == pytest.approx(0.504, abs=5e-4)
    assert (there + half) / (2 * half) == pytest.approx(0.752, abs=5e-4)


FP8 = ["plugins.fp32=null", "plugins.fp8_v3={outside: bf16}", "parallel.expert=2", "train.steps=1"]
TRAVELS = ["plugins.alltoall=null", "plugins.fp8_alltoall={}"]


def trained(overrides):
    from runs import trained

    return trained(overrides)


@pytest.mark.parametrize("experts", [[], SEQUENTIAL])
def test_with_fp8_experts_forward_is_that_of_16_bits_to_the_bit(workers, experts):
    """They round what arrives by the same rule, and rounding twice changes nothing. So it is for gradients of
    outputs; transposed for the weight gradient they are rounded in other tiles, but by powers of two again:
    only numbers too small for the format are."""
    there = workers(2).run(trained, [*FP8, *experts])[0]
    rounded = workers(2).run(trained, [*FP8, *experts, *TRAVELS])[0]
    row, one = rounded["rows"][0], there["rows"][0]
    assert row["loss"] == one["loss"] and row["mtp_loss"] == one["mtp_loss"]
    assert rounded["counts"] == there["counts"]
    assert row["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-6)


PLAN = SimpleNamespace(slots={"platform": "cpu"}, layout=Layout())


def test_settings_and_problems():
    assert Fp8AllToAll().ds_settings(None) == {"model.moe_token_dispatcher_type": "alltoall"}
    for overlap in (False, True):
        model = SimpleNamespace(moe_shared_expert_overlap=overlap)
        found = list(Fp8AllToAll().ds_check(PLAN, SimpleNamespace(model=model)))
        assert [problem.key for problem in found] == ["model.moe_shared_expert_overlap"] * overlap


def test_a_gpu_without_triton_is_told(monkeypatch):
    settings = SimpleNamespace(model=SimpleNamespace(moe_shared_expert_overlap=False))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for platform, told in (("cpu", 0), ("cuda", 1)):
        plan = SimpleNamespace(slots={"platform": platform}, layout=Layout())
        found = list(Fp8AllToAll().ds_check(plan, settings))
        assert len(found) == told and all("needs triton" in problem.message for problem in found)
