"""What a rank's state weighs: predicted from shapes, and measured on the tensors of a run."""

from __future__ import annotations

import pytest

BF16 = ["plugins.fp32=null", "plugins.bf16={}"]


def both(overrides):
    """(expected, measured) of this rank after one step, and how many parameters it holds."""
    import torch
    from runs import assembled

    from dsplugins import footprint
    from dsplugins.step import Progress, take_step

    with assembled(overrides) as run:
        take_step(run, Progress())
        moments = getattr(torch, run.plugins.owner("optimizer").plugin.moments)
        parameters = sum(p.numel() for chunk in run.chunks for p in chunk.parameters())
        expected = footprint.expected(run.chunks, run.settings, moments)
        return vars(expected), vars(footprint.measured(run.chunks, run.optimizer)), parameters


def close(measured, expected):
    """Core pads its buffers, and with ZeRO cuts them anywhere."""
    return abs(measured - expected) <= 0.02 * expected + 4096


CASES = {
    "fp32": (1, [], {"weights": 4, "gradients": 4, "main_weights": 0, "moments": 8}),
    "bf16": (1, BF16, {"weights": 2, "gradients": 4, "main_weights": 4, "moments": 8}),
    "bf16 moments": (
        1,
        [*BF16, "plugins.adamw.moments=bf16"],
        {"weights": 2, "gradients": 4, "main_weights": 4, "moments": 4},
    ),
    "zero over 2": (2, BF16, {"weights": 2, "gradients": 4, "main_weights": 2, "moments": 4}),
    "without zero": (
        2,
        [*BF16, "plugins.adamw.zero=false"],
        {"weights": 2, "gradients": 4, "main_weights": 4, "moments": 8},
    ),
}
"""Ranks, overrides, bytes a parameter of the rank."""


@pytest.mark.parametrize("case", CASES)
def test_bytes_a_parameter(workers, case):
    size, overrides, bytes_each = CASES[case]
    for expected, measured, parameters in workers(size).run(both, overrides):
        for name, each in bytes_each.items():
            assert expected[name] == pytest.approx(each * parameters, abs=256), name
            assert close(measured[name], expected[name]), name


def test_experts_are_shared_by_fewer_ranks(workers):
    """With EP2 on two ranks each expert stands once, so ZeRO has nothing to share there."""
    for expected, measured, _ in workers(2).run(both, [*BF16, "parallel.expert=2"]):
        assert expected["main_weights"] > expected["weights"], "more than half of the weights' 4 bytes each"
        for name in expected:
            assert close(measured[name], expected[name]), name
