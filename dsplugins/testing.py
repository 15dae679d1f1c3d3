"""What plugin authors test with: resident worker processes and a model-parallel world in miniature.

    from dsplugins.testing import model_parallel

    def job(scale):                             # a module-level function: it runs on every rank
        with model_parallel(tensor=2):
            ...
            return {"loss": ...}

    def test_x(workers):
        first, second = workers(2).run(job, 0.5)

Importing megatron-core takes seconds, so the processes are started once and reused by all tests. Put
`pytest_plugins = ["dsplugins.testing"]` into a `conftest.py` for the fixtures `workers` and `single`.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.util
import inspect
import multiprocessing
import os
import pickle
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from multiprocessing import connection
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import torch

GRACE = 5.0
"""Seconds that the other ranks get to answer once one has failed; they may hang in a collective."""
DDP_HOOK = "DistributedDataParallel._make_backward_post_hook."
"""Where megatron-core makes the hooks that keep a model alive."""
IDLE = 0.5
"""Seconds without a job after which a worker collects garbage: idle process groups poll the network."""
START = 180.0
"""Seconds that a pool may take to start: the import of megatron-core on a busy machine."""


class JobFailed(RuntimeError):
    """A job raised, died or hung on some rank; the message has each rank's traceback.

    `__cause__` is the first failed rank's exception where it could be carried over.
    """


@dataclass(frozen=True)
class Job:
    """What a worker is sent, pickled: it must import the function before it can unpickle arguments."""

    module: str
    file: str
    qualname: str
    path: tuple[str, ...]
    arguments: bytes


@dataclass(frozen=True)
class Answer:
    """What a worker sends back, pickled."""

    value: Any = None
    traceback: str = ""
    error: BaseException | None = None


class Workers:
    """A pool of `size` gloo ranks with the CPU platform, started at the first job and then kept.

    A pool in which a job failed is thrown away: its ranks may be out of step with each other.
    """

    def __init__(self, size: int, timeout: float = 300.0) -> None:
        self.size = size
        self.timeout = timeout
        self._processes: list[Any] = []
        self._pipes: list[connection.Connection] = []
        self._store: Any = None

    def run(self, job: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """Run `job(*args, **kwargs)` on every rank; the results, by rank.

        `job` is a module-level function; arguments and results are pickled. Raises `JobFailed` when
        a rank raises, dies, or hasn't answered after `timeout` seconds.
        """
        message = pickle.dumps(_describe(job, args, kwargs))
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send_bytes(message)
        answers = self._collect(self.timeout)
        if any(answer is None or answer.traceback for answer in answers):
            self.stop()
            raise _failure(job.__qualname__, answers, self.timeout)
        return [answer.value for answer in answers if answer is not None]

    def stop(self) -> None:
        """Kill the processes; the next job starts new ones."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes, self._store = [], [], None

    def _start(self) -> None:
        """Spawn the ranks. The store lives here, on a port that the system picks: nothing races."""
        import torch.distributed as dist

        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        context = multiprocessing.get_context("spawn")
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, self.size, self._store.port, theirs, self.timeout), daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
        answers = self._collect(START)
        if any(answer is None or answer.traceback for answer in answers):
            self.stop()
            raise _failure("the start of the pool", answers, START)

    def _collect(self, timeout: float) -> list[Answer | None]:
        """One answer a rank; None where a rank died or let the time pass."""
        answers: list[Answer | None] = [None] * self.size
        waiting = dict(zip(self._pipes, range(self.size), strict=True))
        deadline = time.monotonic() + timeout
        while waiting and (left := deadline - time.monotonic()) > 0:
            for pipe in connection.wait(list(waiting), timeout=left):
                assert isinstance(pipe, connection.Connection)
                rank = waiting.pop(pipe)
                answers[rank] = _receive(pipe)
                if answers[rank].traceback:  # type: ignore[union-attr]
                    deadline = min(deadline, time.monotonic() + GRACE)
        return answers


def _receive(pipe: connection.Connection) -> Answer:
    try:
        return pickle.loads(pipe.recv_bytes())
    except (EOFError, ConnectionError):
        return Answer(traceback="the process died")


def _failure(name: str, answers: Sequence[Answer | None], timeout: float) -> JobFailed:
    """The exception that tells what happened on each rank that didn't finish."""
    told = []
    for rank, answer in enumerate(answers):
        if answer is None:
            told.append(
                f"rank {rank}: no answer (limit {timeout:.0f} s, {GRACE:.0f} s after another failure)"
            )
        elif answer.traceback:
            told.append(f"rank {rank}:\n{answer.traceback}")
    failure = JobFailed(f"{name} failed\n" + "\n".join(told))
    failure.__cause__ = next((answer.error for answer in answers if answer and answer.error), None)
    return failure


def _describe(job: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Job:
    """Raises ValueError for a lambda or a nested function: another process can't find those."""
    if "<" in job.__qualname__:
        raise ValueError(f"{job.__qualname__} must be a module-level function to run on workers")
    file = os.path.abspath(inspect.getfile(job))
    path = (os.getcwd(), os.path.dirname(file), *sys.path)
    return Job(job.__module__, file, job.__qualname__, path, pickle.dumps((args, kwargs)))


# -- in the worker --------------------------------------------------------------------------------


def _serve(rank: int, size: int, port: int, pipe: connection.Connection, timeout: float) -> None:
    """A worker's life: prepare the platform, join the group, answer jobs until the pipe closes."""
    os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", TORCHDYNAMO_DISABLE="1")
    pipe.send_bytes(_answer(partial(_join, rank, size, port, timeout)))
    while True:
        try:
            if not pipe.poll(IDLE):
                gc.collect()
            message = pipe.recv_bytes()
        except (EOFError, ConnectionError):
            return
        pipe.send_bytes(_answer(partial(_perform, message)))


def _join(rank: int, size: int, port: int, timeout: float) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="megatron")  # what core misses would be told once a rank
    prepare_cpu()
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout)
    )
    importlib.import_module("dsplugins.assemble")
    gc.freeze()  # what was imported stays: a collection after each job then has little to look through


def _answer(work: Callable[[], Any]) -> bytes:
    """What `work` returned or how it failed, pickled."""
    try:
        return pickle.dumps(Answer(value=work()))
    except BaseException as error:
        text = traceback.format_exc()
        try:
            carried = pickle.dumps(Answer(traceback=text, error=error))
            pickle.loads(carried)  # some exceptions pickle but can't be made again
            return carried
        except Exception:
            return pickle.dumps(Answer(traceback=text))


def _perform(message: bytes) -> Any:
    job: Job = pickle.loads(message)
    sys.path.extend(entry for entry in job.path if entry not in sys.path)
    function: Any = _module(job)
    for name in job.qualname.split("."):
        function = getattr(function, name)
    args, kwargs = pickle.loads(job.arguments)
    return function(*args, **kwargs)


def _module(job: Job) -> ModuleType:
    """The job's module: by name, or by file where the name leads elsewhere (two `test_x.py`)."""
    with contextlib.suppress(ImportError):
        found = importlib.import_module(job.module)
        if os.path.abspath(getattr(found, "__file__", None) or "") == job.file:
            return found
    spec = importlib.util.spec_from_file_location(job.module, job.file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[job.module] = module
    spec.loader.exec_module(module)
    return module


# -- in any process -------------------------------------------------------------------------------


def prepare_cpu() -> torch.device:
    """Make this process a CPU one, as the plugin `cpu` does in a run."""
    from importlib import metadata

    (entry,) = metadata.entry_points(group="dsplugins.platform", name="cpu")
    return entry.load()().ds_platform(plan=None).prepare(0)


@contextlib.contextmanager
def model_parallel(
    tensor: int = 1,
    pipeline: int = 1,
    virtual_pipeline: int | None = None,
    expert: int = 1,
    expert_tensor: int = 1,
    context: int = 1,
    seed: int = 1234,
    order: str = "tp-cp-ep-dp-pp",
) -> Iterator[None]:
    """megatron-core's parallel groups and random states, with the recipe's short names.

    Data parallel is what is left of the world. Groups are destroyed on leaving. To be entered by all
    ranks together; `virtual_pipeline` 1 counts as none.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    chunks = virtual_pipeline if virtual_pipeline and virtual_pipeline > 1 else None
    with temporary_groups():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tensor,
            pipeline_model_parallel_size=pipeline,
            virtual_pipeline_model_parallel_size=chunks,
            expert_model_parallel_size=expert,
            expert_tensor_parallel_size=expert_tensor,
            context_parallel_size=context,
            order=order,
        )
        model_parallel_cuda_manual_seed(seed)
        yield


@contextlib.contextmanager
def temporary_groups() -> Iterator[None]:
    """On leaving, destroy megatron-core's groups and every process group made inside.

    What core keeps for the whole process, in the shape of the last run, is forgotten too.
    """
    import torch.distributed as dist
    from megatron.core import parallel_state

    before = set(dist.distributed_c10d._world.pg_map)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        _let_go()
        for group in set(dist.distributed_c10d._world.pg_map) - before:
            dist.destroy_process_group(group)
        _forget()


def _let_go() -> None:
    """Free models that are no longer used, with their process groups, which have three threads each.

    Two circles lead through C++, unseen by the garbage collector: a hook of core's DDP on each gradient's
    autograd node holds the model, and modules and dispatchers keep tensors whose graph holds such nodes.
    """
    _cut_circles()  # a call of its own: no name in here may hold the last object while garbage is collected
    gc.collect()


def _cut_circles() -> None:
    import torch
    from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher

    keepers: dict[type, bool] = {}  # there are a million objects, of some thousand types
    for thing in gc.get_objects():
        kind = type(thing)
        if kind is FunctionType and thing.__qualname__.startswith(DDP_HOOK):
            for cell in thing.__closure__ or ():
                cell.cell_contents = None
        if kind not in keepers:
            keepers[kind] = issubclass(kind, torch.nn.Module | MoETokenDispatcher)
        if keepers[kind]:
            kept = vars(thing)
            for name, value in kept.items():
                if isinstance(value, torch.Tensor) and value.grad_fn is not None:
                    kept[name] = None


def _forget() -> None:
    """MTP's losses of an unfinished step, and the scales of its loss and of balance losses."""
    import torch
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
    from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler, MTPLossLoggingHelper

    MTPLossLoggingHelper.tracker.clear()
    MTPLossAutoScaler.main_loss_backward_scale = torch.tensor(1.0)  # as core has it at first
    MoEAuxLossAutoScaler.main_loss_backward_scale = None


# -- fixtures -------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def workers() -> Iterator[Callable[[int], Workers]]:
    """`workers(n)`: the session's pool of n ranks."""
    pools: dict[int, Workers] = {}

    def pool(size: int) -> Workers:
        return pools.setdefault(size, Workers(size))

    yield pool
    for started in pools.values():
        started.stop()


@pytest.fixture(scope="session")
def _world_of_one() -> Iterator[torch.device]:
    """This process as a gloo world of its own, with the CPU platform."""
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        pytest.skip("runs where no GPU is visible: CUDA_VISIBLE_DEVICES=''")
    device = prepare_cpu()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield device
    dist.destroy_process_group()


@pytest.fixture
def single(_world_of_one: torch.device) -> Iterator[torch.device]:
    """One rank in the pytest process, all parallel sizes 1, seed 1234; gives the device."""
    with model_parallel():
        yield _world_of_one


__all__ = ["JobFailed", "Workers", "model_parallel", "prepare_cpu", "single", "temporary_groups", "workers"]
