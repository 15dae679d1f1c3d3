"""The tiny recipe on a GPU: the CPU's losses, the same ones twice, and once more after a stop."""

from __future__ import annotations

import importlib.util

import pytest
from gpu.short_runs import (
    BACKENDS,
    LOOSE,
    ON_CPU,
    PRECISIONS,
    RECIPE,
    SHORT,
    STEPS,
    TIGHT,
    apart,
    numbers,
    stopped_and_resumed,
    train_on,
)

# -- on the CPU: what the tests below use -----------------------------------------------------------


def test_bf16_is_apart_from_fp32_on_the_cpu(workers):
    from runs import TINY

    exact, half = (
        workers(1).run(train_on, more, str(TINY))[0]["rows"]
        for more in ((), ("plugins.fp32=null", "plugins.bf16={}"))
    )
    assert not apart(exact, exact, (0.0,) * STEPS)
    assert apart(half, exact, (1e-7,) * STEPS)
    assert apart([{**row, "loss": float("nan")} for row in exact], exact, LOOSE)


def test_resuming_on_the_cpu(workers, tmp_path):
    from runs import TINY

    ((whole, again),) = workers(1).run(stopped_and_resumed, (), str(TINY), str(tmp_path))
    assert numbers(whole)[2:] == numbers(again) and [row["step"] for row in whole] == [1, 2, 3, 4]


def test_the_recipe_is_the_same_on_both_sides():
    from dsplugins.plan import prepare
    from dsplugins.recipe import Recipe

    for precision in PRECISIONS.values():
        on_gpu, on_cpu = (
            prepare(Recipe.load(RECIPE, [*SHORT, *precision, *more]))[1] for more in ((), ON_CPU)
        )
        assert (on_gpu.slots["platform"], on_cpu.slots["platform"]) == ("cuda", "cpu")
        assert {**on_gpu.slots, "platform": "cpu"} == on_cpu.slots
        assert on_gpu.model == on_cpu.model and on_gpu.train == on_cpu.train


# -- on a GPU ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_cpu(workers):
    """Precision -> what the CPU says, each trained once."""
    found = {}

    def trained(precision):
        if precision not in found:
            line = (*SHORT, *PRECISIONS[precision], *ON_CPU)
            found[precision] = workers(1).run(train_on, line)[0]
        return found[precision]

    return trained


@pytest.mark.gpu
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_losses_are_those_of_the_cpu(nccl, on_cpu, backend, precision):
    if backend == "te" and importlib.util.find_spec("transformer_engine") is None:
        pytest.skip("transformer_engine is not installed here")
    mine = train_on((*SHORT, *PRECISIONS[precision], *BACKENDS[backend]))
    theirs = on_cpu(precision)
    exact = (backend, precision) == ("torch_local", "fp32")
    assert not apart(mine["rows"], theirs["rows"], TIGHT if exact else LOOSE)
    bound = TIGHT[-1] if exact else LOOSE[-1]
    assert mine["evaluation"]["loss"] == pytest.approx(theirs["evaluation"]["loss"], rel=bound)
    if exact:  # a near-tie of two affinities may send a token elsewhere
        counts = [ours for layer in mine["counts"][0] for ours in layer]
        others = [theirs for layer in theirs["counts"][0] for theirs in layer]
        moved = sum(abs(a - b) for a, b in zip(counts, others, strict=True))
        assert sum(counts) == sum(others) and moved <= 1e-3 * sum(others)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_run_repeats_itself(nccl, deterministic, precision):
    first, second = (train_on((*SHORT, *PRECISIONS[precision])) for _ in range(2))
    assert numbers(first["rows"]) == numbers(second["rows"]) and first["counts"] == second["counts"]


@pytest.mark.gpu
def test_a_stopped_run_goes_on_bit_for_bit(nccl, deterministic, tmp_path):
    whole, again = stopped_and_resumed(SHORT, RECIPE, tmp_path)
    assert numbers(whole)[2:] == numbers(again)
