"""fp8_v3 beside what changes the order of a step: schedules, overlap, kept codes, inputs made again."""

from __future__ import annotations

import pytest

FP8 = [
    "plugins.fp32=null",
    "plugins.fp8_v3={}",
    *("train.steps=2", "train.micro_batch=1", "train.global_batch=4"),
]
KEPT = ["plugins.fp8_v3.keep_weights=true"]
NUMBERS = ("loss", "mtp_loss", "aux_loss", "grad_norm")
EP_OVERLAP = ["plugins.one_f_one_b=null", "plugins.ep_overlap={}"]
INTERLEAVED = ["parallel.virtual_pipeline=2", "plugins.one_f_one_b=null", "plugins.interleaved={}"]
OVERLAPPED = ["plugins.adamw.overlap_grad_reduce=true", "plugins.adamw.overlap_param_gather=true"]
RECOMPUTED = ["plugins.v3_recompute={mla_up_proj: false}"]
CASES = {
    "ep_overlap": (["parallel.expert=2", "plugins.mtp=null"], EP_OVERLAP),
    "interleaved": (["parallel.pipeline=2", "optimizer.clip_grad=0.0"], INTERLEAVED),
    "dp2": ([], OVERLAPPED),
    "tp2, inputs made again": (["parallel.tensor=2"], RECOMPUTED),
    "pp2, inputs made again": (["parallel.pipeline=2"], RECOMPUTED),
    "ep2": (["parallel.expert=2", "plugins.mtp=null"], [*EP_OVERLAP, *OVERLAPPED]),
}
"""What both runs of two ranks have, what one has besides. Where layers stand on other ranks, squares are
summed in another order, and clipping would carry that into the weights; it is off there."""


def trained(overrides):
    from runs import trained

    return trained([*FP8, *overrides])


@pytest.mark.parametrize("case", CASES)
def test_every_number_stays_what_it_was(workers, case):
    both, besides = CASES[case]
    there, here = (workers(2).run(trained, [*both, *more])[0] for more in ([], [*besides, *KEPT]))
    for row, one in zip(here["rows"], there["rows"], strict=True):
        assert {key: row[key] for key in NUMBERS} == {key: one[key] for key in NUMBERS}
    assert here["counts"] == there["counts"] and here["evaluation"] == there["evaluation"]
