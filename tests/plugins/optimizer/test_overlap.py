"""Overlapped reduction and gathering: the same numbers to the bit, through evaluations and checkpoints."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from runs import SEQUENTIAL

REDUCE = ["plugins.adamw.overlap_grad_reduce=true"]
BOTH = [*REDUCE, "plugins.adamw.overlap_param_gather=true"]
SMALL = ["ddp.bucket_size=4000"]
INTERLEAVED = [
    *("train.micro_batch=1", "evaluate.sequences=4"),
    *("parallel.pipeline=2", "parallel.virtual_pipeline=2"),
    *("plugins.one_f_one_b=null", "plugins.interleaved={}"),
]
SEVERAL = ["train.micro_batch=2", "evaluate.sequences=4"]
"""Micro-batches a step, so that reduction waits for the last one."""
EP_OVERLAP = [
    *("parallel.expert=2", "plugins.mtp=null"),
    *("plugins.one_f_one_b=null", "plugins.ep_overlap={}"),
]
BF16 = ["plugins.fp32=null", "plugins.bf16={}"]
UNCLIPPED = ["optimizer.clip_grad=0.0"]
CASES: dict[str, tuple[int, list[str], list[str]]] = {
    "dp2": (2, [*SEVERAL, *BF16], BOTH),
    "dp2, many buckets": (2, [*SEVERAL, *SEQUENTIAL, *UNCLIPPED], [*BOTH, *SMALL]),
    "dp2, many buckets, no zero": (2, [*SEVERAL, "plugins.adamw.zero=false"], [*REDUCE, *SMALL]),
    "ep2 x ep_overlap, many buckets": (2, [*SEVERAL, *EP_OVERLAP, *BF16, *UNCLIPPED], [*BOTH, *SMALL]),
    "dp2 x pp2 x vpp2": (4, INTERLEAVED, BOTH),
}
"""Ranks, what both runs have, what the overlapped one has besides. Of experts in turn, those without
tokens must have their gradients told to be there, too.

Several buckets with ZeRO cut each rank's share elsewhere: squares are summed in another order, and clipping
would carry that into the weights; it is off there.
"""


def digest(run: Any) -> str:
    """Of all weights of this rank, to the bit."""
    from dsplugins.model import gather_weights

    gather_weights(run.chunks)
    found = hashlib.sha256()
    for chunk in run.chunks:
        for parameter in chunk.parameters():
            found.update(parameter.detach().float().numpy().tobytes())
    return found.hexdigest()


def course(overrides: list[str], folder: str, until: int) -> dict[str, Any]:
    """Up to step `until`, from the checkpoint in `folder` if there is one; evaluates and saves after 2."""
    from runs import assembled

    from dsplugins.evaluate import evaluate
    from dsplugins.saver import Saver
    from dsplugins.step import take_step

    with assembled([*overrides, "save.asynchronous=false"]) as run:
        saver = Saver(run, Path(folder))
        progress, _ = saver.resume()
        found: dict[str, Any] = {"norms": {}, "losses": {}, "evaluations": {}}
        while progress.steps < until:
            step = take_step(run, progress)
            progress = progress.after(step)
            found["losses"][step.step] = (step.loss, step.mtp_loss, step.aux_loss)
            found["norms"][step.step] = step.grad_norm
            if step.step == 2:
                saver.save(progress)
            if step.step % 2 == 0:
                seen = evaluate(run, step.step)
                found["evaluations"][step.step] = (seen.loss, seen.mtp_loss)
        saver.close()
        groups = [[*c.bucket_groups, *c.expert_parallel_bucket_groups] for c in run.chunks]
        found["buckets"] = sum(len(group.buckets) for each in groups for group in each)
        return found | {"weights": digest(run)}


def compared(both: list[str], overlapped: list[str], folder: str) -> dict[str, dict[str, Any]]:
    """Steps 1 to 4 plain and overlapped; on two ranks the last two again from the other's checkpoint."""
    import torch

    plain, late = f"{folder}/plain", f"{folder}/late"
    found = {"plain": course(both, plain, 4), "late": course([*both, *overlapped], late, 4)}
    if torch.distributed.get_world_size() == 2:
        found["late, then plain"] = course(both, late, 4)
        found["plain, then late"] = course([*both, *overlapped], plain, 4)
    return found


@pytest.mark.parametrize("case", CASES)
def test_overlap_changes_no_bit(workers, tmp_path, case):
    size, both, overlapped = CASES[case]
    for found in workers(size).run(compared, both, overlapped, str(tmp_path)):
        plain = found.pop("plain")
        for name, other in found.items():
            steps = set(other["losses"])
            assert steps == ({1, 2, 3, 4} if name == "late" else {3, 4})
            for kind in ("losses", "evaluations"):
                expected = {step: value for step, value in plain[kind].items() if step in steps}
                assert other[kind] == expected, f"{name}: {kind}"
            assert other["weights"] == plain["weights"], name
            tolerance = 1e-6 if "optimizer.clip_grad=0.0" in both else 0
            for step in steps:
                assert other["norms"][step] == pytest.approx(plain["norms"][step], rel=tolerance, abs=0)
        if "many" in case:
            assert found["late"]["buckets"] >= 9 > plain["buckets"]


def stale(folder: str) -> bool:
    """Whether weights that nobody gathered differ from the gathered ones."""
    from runs import assembled

    from dsplugins.model import gather_weights
    from dsplugins.step import Progress, take_step

    with assembled(BOTH) as run:
        take_step(run, Progress())
        parameters = list(run.chunks[0].parameters())
        before = [parameter.detach().clone() for parameter in parameters]
        gather_weights(run.chunks)
        return any(not old.equal(new) for old, new in zip(before, parameters, strict=True))


def test_without_a_gather_a_checkpoint_would_hold_old_weights(workers, tmp_path):
    assert all(workers(2).run(stale, str(tmp_path)))


# -- refusals ---------------------------------------------------------------------------------------


def said(
    ranks: dict[str, int] | None = None, model: dict[str, Any] | None = None, **options: Any
) -> list[str]:
    """Keys of the problems that the options have on two ranks."""
    from dsplugins.contracts import Layout
    from dsplugins.plugins.optimizer.adamw import AdamWOptions
    from dsplugins.plugins.optimizer.overlap import problems

    ddp = {"bucket_size": None, "num_buckets": None} | options.pop("ddp", {})
    optimizer = {"overlap_param_gather_with_optimizer_step": False} | options.pop("optimizer", {})
    settings: Any = SimpleNamespace(
        model=SimpleNamespace(**{"num_moe_experts": 8, "delay_wgrad_compute": False} | (model or {})),
        ddp=SimpleNamespace(**ddp),
        optimizer=SimpleNamespace(**optimizer),
        writers={f"ddp.{field}": "recipe" for field, value in ddp.items() if value},
    )
    plan: Any = SimpleNamespace(layout=Layout(**{"world_size": 2} | (ranks or {})))
    return [problem.message for problem in problems(AdamWOptions(**options), plan, settings)]


def test_wishes_that_exclude_each_other_are_told():
    both = {"overlap_grad_reduce": True, "overlap_param_gather": True}
    assert said() == [] and said(**both) == []
    (message,) = said(**both, zero=False)
    assert "has nothing to gather" in message
    (message,) = said(overlap_param_gather=True)
    assert "needs overlap_grad_reduce=true" in message
    (message,) = said(model={"delay_wgrad_compute": True}, overlap_grad_reduce=True)
    assert "without transformer-engine" in message
    (message,) = said(optimizer={"overlap_param_gather_with_optimizer_step": True})
    assert "can't be checkpointed" in message


def test_overlap_without_copies_is_told():
    (message,) = said({"world_size": 1}, overlap_grad_reduce=True)
    assert "no two ranks hold the same weights" in message
    assert said({"tensor": 2, "expert": 2}, overlap_grad_reduce=True) != []
    assert said({"tensor": 2}, overlap_grad_reduce=True) == [], "experts have two copies"
    assert said({"tensor": 2}, {"num_moe_experts": None}, overlap_grad_reduce=True) != []
    assert said({"expert": 2}, overlap_grad_reduce=True) == [], "all but the experts have two copies"


def test_buckets_without_overlap_are_told():
    (message,) = said(ddp={"bucket_size": 4000})
    assert "ddp.bucket_size has no effect" in message
    assert said(ddp={"bucket_size": 4000}, overlap_grad_reduce=True) == []
