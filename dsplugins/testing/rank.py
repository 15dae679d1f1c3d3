"""A worker's life: it joins its pool's group and answers jobs until nobody sends any more."""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.util
import inspect
import os
import pickle
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from multiprocessing import connection
from types import ModuleType
from typing import Any

IDLE = 0.5
"""Seconds without a job after which a worker collects garbage: idle process groups poll the network."""


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


def describe(job: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Job:
    """Raises ValueError for a lambda or a nested function: another process can't find those."""
    if "<" in job.__qualname__:
        raise ValueError(f"{job.__qualname__} must be a module-level function to run on workers")
    file = os.path.abspath(inspect.getfile(job))
    path = (os.getcwd(), os.path.dirname(file), *sys.path)
    return Job(job.__module__, file, job.__qualname__, path, pickle.dumps((args, kwargs)))


def serve(rank: int, size: int, port: int, pipe: connection.Connection, timeout: float) -> None:
    """A worker's life: join the group, answer jobs until the pipe closes."""
    from dsplugins.testing.world import free

    pipe.send_bytes(_answer(partial(_join, rank, size, port, timeout)))
    while True:
        try:
            if not pipe.poll(IDLE):
                gc.collect()
            message = pipe.recv_bytes()
        except (EOFError, ConnectionError):
            return
        pipe.send_bytes(_answer(partial(_perform, message)))
        free()


def _join(rank: int, size: int, port: int, timeout: float) -> None:
    importlib.import_module("dsplugins.testing.preloaded")
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout)
    )


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


__all__ = ["Answer", "Job", "describe", "serve"]
