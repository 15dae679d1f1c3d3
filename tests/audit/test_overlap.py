"""Buckets, hooks and calls that are not those of the overlap that was chosen."""

from __future__ import annotations

from typing import Any

import pytest

BOTH = ["plugins.adamw.overlap_grad_reduce=true", "plugins.adamw.overlap_param_gather=true"]


def first_group(run: Any) -> Any:
    return run.chunks[0].bucket_groups[0]


def untold_bucket(run: Any) -> None:
    import copy

    group = first_group(run)
    group.ddp_config = copy.copy(group.ddp_config)
    group.ddp_config.overlap_grad_reduce = False


def lost_parameter(run: Any) -> None:
    group = first_group(run)
    group.params.remove(next(iter(group.params)))


def wrong_report(run: Any) -> None:
    chunk = run.chunks[0]
    name, parameter = next(iter(chunk.named_parameters()))
    chunk.param_to_bucket_group[parameter] = chunk.expert_parallel_bucket_groups


def deaf_parameter(run: Any) -> None:
    run.chunks[0].grad_accs.pop()


def no_waiting(run: Any) -> None:
    run.chunks[0].disable_forward_pre_hook(param_sync=False)


def no_common_start(run: Any) -> None:
    for config in run.configs:
        config.grad_sync_func = None


def other_start(run: Any) -> None:
    for config in run.configs:
        config.param_sync_func = print


def gathers_itself(run: Any) -> None:
    import copy

    from dsplugins.optimizer_groups import leaves

    for part in leaves(run.optimizer):
        part.ddp_config = copy.copy(part.ddp_config)
        part.ddp_config.overlap_param_gather = False


SPOILT = {
    "chunk 0: 1 bucket groups do not have overlap_grad_reduce=True": untold_bucket,
    "is in 0 buckets or reports to another: its gradient would be lost": lost_parameter,
    "is in 1 buckets or reports to another: its gradient would be lost": wrong_report,
    "parameters start a reduction": deaf_parameter,
    "modules would compute with weights of the step before: all": no_waiting,
    "config.grad_sync_func is not start_grad_sync of each chunk": no_common_start,
    "config.param_sync_func is set": other_start,
    "the optimizer holds overlap_param_gather=False, chosen was True": gathers_itself,
}


def by_hand() -> dict[str, list[str]]:
    """What the audit finds of the run as it is, and after each change to a fresh one."""
    from audit.provoke import unaudited, verdict

    found = {}
    for said, spoil in {"": lambda run: None, **SPOILT}.items():
        with unaudited(*BOTH) as run:
            spoil(run)
            found[said] = verdict(run)
    return found


@pytest.fixture(scope="module")
def found(workers):
    return workers(2).run(by_hand)


def test_an_overlapped_run_is_as_chosen(found):
    assert [rank[""] for rank in found] == [[], []]


@pytest.mark.parametrize("said", SPOILT)
def test_another_overlap_is_told(found, said):
    for rank in found:
        assert any(said in line for line in rank[said]), rank[said]
