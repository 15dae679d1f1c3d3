"""The worker pool itself: results, failures, hangs, restarts, clashing module names."""

import os
import time

import pytest

from dsplugins.testing import JobFailed, Workers, model_parallel


def total(number):
    import torch
    import torch.distributed as dist

    value = torch.tensor([float(number + dist.get_rank())])
    dist.all_reduce(value)
    return dist.get_rank(), value.item(), os.getpid()


def layout():
    from megatron.core import parallel_state as ps

    with model_parallel(tensor=2, expert=2):
        sizes = ps.get_tensor_model_parallel_world_size(), ps.get_expert_model_parallel_world_size()
    return sizes, ps.model_parallel_is_initialized()


def groups():
    import torch.distributed as dist

    for _ in range(3):
        with model_parallel(pipeline=2):
            pass
    return len(dist.distributed_c10d._world.pg_map)


def threads():
    import torch

    return torch.get_num_threads(), os.environ["OMP_NUM_THREADS"]


def threads_of_the_process_after_runs():
    from runs import assembled

    from dsplugins.step import Progress, take_step

    counted = []
    for _ in range(4):
        with assembled(["train.steps=1"]) as run:
            take_step(run, Progress())
        counted.append(len(os.listdir("/proc/self/task")))
    return counted


def fails_on_one():
    import torch.distributed as dist

    if dist.get_rank() == 1:
        raise ValueError("rank one has had enough")
    dist.barrier()


def dies():
    os._exit(7)


def hangs():
    time.sleep(60)


def test_results_come_by_rank_from_resident_processes(workers):
    first = workers(2).run(total, 10)
    assert [(rank, value) for rank, value, _ in first] == [(0, 21.0), (1, 21.0)]
    assert first == workers(2).run(total, number=10)


def test_model_parallel_is_set_up_and_gone_after(workers):
    assert workers(2).run(layout) == [((2, 2), False)] * 2


def test_no_process_group_is_left_behind(workers):
    assert workers(2).run(groups) == [1, 1]


def test_one_thread_a_worker(workers):
    assert workers(2).run(threads) == [(1, "1")] * 2


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="threads are counted in Linux's way")
def test_models_do_not_pile_up_with_their_groups(workers):
    (counted,) = workers(1).run(threads_of_the_process_after_runs)
    # A model has some 20 process groups of three threads each; the last one is freed by the next.
    # Some other thread may come or go meanwhile: what must not stay is a model's worth of them, three times.
    assert counted[-1] - counted[0] < 20, counted


def test_single_is_a_world_of_one(single):
    from megatron.core import parallel_state as ps

    assert single.type == "cpu"
    assert ps.get_data_parallel_world_size() == 1


def test_a_lambda_is_refused(workers):
    with pytest.raises(ValueError, match="module-level"):
        workers(2).run(lambda: None)


def test_failure_names_rank_and_the_pool_restarts(workers):
    before = workers(2).run(total, 0)
    with pytest.raises(JobFailed, match="rank 1:(?s:.*)rank one has had enough") as caught:
        workers(2).run(fails_on_one)
    assert isinstance(caught.value.__cause__, ValueError)
    after = workers(2).run(total, 0)
    assert [line[:2] for line in after] == [line[:2] for line in before]
    assert after[0][2] != before[0][2], "the pool must be new: its ranks were out of step"


@pytest.mark.parametrize(("job", "message"), [(dies, "process died"), (hangs, "no answer")])
def test_death_and_hang_are_told(job, message):
    pool = Workers(1, timeout=2.0)
    with pytest.raises(JobFailed, match=message):
        pool.run(job)
    pool.stop()
