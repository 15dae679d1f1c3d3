"""`torch.cuda` led to another device, so that unmodified megatron-core runs where there is no GPU.

megatron-core writes `device="cuda"`, asks `torch.cuda.current_device()` and compares type names with
`torch.cuda.FloatTensor`. Here torch answers such questions with the CPU; no megatron module is
touched. This is a process-wide change of torch: for processes without a GPU only.

A `TorchFunctionMode` would do the same in fewer lines, but costs microseconds on *every* operator;
wrapped factories cost a fraction of one, and operators nothing.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

import torch
from torch.utils import _device

FACTORIES = (
    *("arange", "as_tensor", "asarray", "empty", "empty_like", "empty_strided", "eye", "full", "full_like"),
    *("linspace", "logspace", "ones", "ones_like", "rand", "rand_like", "randint", "randint_like"),
    *("randn", "randn_like", "randperm", "tensor", "zeros", "zeros_like"),
)
"""Functions of `torch` that take `device=` and make a tensor."""

CUDA_NAMES = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
    torch.float16: "torch.cuda.HalfTensor",
}
"""What `Tensor.type()` says: core's optimizers and gradient clipping compare these names."""


class Stream:
    """A stream of a device that does everything at once, in order."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        self.cuda_stream = 0

    def wait_stream(self, stream: object) -> None:
        """Nothing to wait for."""

    def wait_event(self, event: object) -> None:
        """Nothing to wait for."""

    def record_event(self, event: Event | None = None) -> Event:
        """The event given, or a new one."""
        return Event() if event is None else event

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """Everything is done."""
        return True

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exc: object) -> None:
        return None


class Event:
    """An event that has always happened already; measures no time."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        return None

    def record(self, stream: object = None) -> None:
        """Nothing to record."""

    def wait(self, stream: object = None) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """It has happened."""
        return True

    def elapsed_time(self, end: object) -> float:
        """Milliseconds to `end`: nothing is measured here."""
        return 0.0


class _Generators:
    """Stands for `torch.cuda.default_generators`: whatever the index, the CPU's generator."""

    def __getitem__(self, index: object) -> torch.Generator:
        return torch.default_generator


def _is_cuda(device: object) -> bool:
    """Whether `device` means a GPU, in any of the forms that torch takes."""
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return device.startswith("cuda") if isinstance(device, str) else isinstance(device, int)


def _redirected(factory: Callable[..., Any], stand_in: torch.device) -> Callable[..., Any]:
    """`factory`, but on `stand_in` where a GPU is asked for, and without pinned memory."""

    @functools.wraps(factory)
    def on_stand_in(*args: Any, **kwargs: Any) -> Any:
        if kwargs:
            device = kwargs.get("device")
            if device is not None and device is not stand_in and _is_cuda(device):
                kwargs["device"] = stand_in
            if "pin_memory" in kwargs:
                del kwargs["pin_memory"]
        return factory(*args, **kwargs)

    return on_stand_in


def _type_name(original: Callable[..., Any]) -> Callable[..., Any]:
    """`Tensor.type`, but floating-point tensors give the name that they would have on a GPU."""

    @functools.wraps(original)
    def type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not args and not kwargs and self.dtype in CUDA_NAMES:
            return CUDA_NAMES[self.dtype]
        return original(self, *args, **kwargs)

    return type_name


def _itself(self: Any, *args: object, **kwargs: object) -> Any:
    return self


def _nothing(*args: object, **kwargs: object) -> None:
    return None


def _get_rng_state(device: object = "cuda") -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, device: object = "cuda") -> None:
    torch.set_rng_state(new_state)


def _manual_seed(seed: int) -> None:
    torch.default_generator.manual_seed(int(seed))


@contextlib.contextmanager
def _profiler_range(message: str, *args: object, **kwargs: object) -> Iterator[None]:
    yield


def _put(target: ModuleType | type, attributes: Mapping[str, object]) -> None:
    for name, value in attributes.items():
        setattr(target, name, value)


def _types() -> dict[str, object]:
    """NVIDIA's apex makes such a tensor in its optimizer, which core takes where it is installed."""
    return {"IntTensor": torch.IntTensor}


def _streams(stand_in: torch.device) -> dict[str, object]:
    """Device, streams and events; `current_device` answers a device, which every user of it takes."""
    stream = Stream()
    return {
        "current_device": lambda: stand_in,
        "set_device": _nothing,
        "synchronize": _nothing,
        "Stream": Stream,
        "Event": Event,
        "current_stream": lambda *args, **kwargs: stream,
        "default_stream": lambda *args, **kwargs: stream,
        "set_stream": _nothing,
        "stream": lambda *args, **kwargs: contextlib.nullcontext(),
        "is_current_stream_capturing": lambda: False,
    }


def _random() -> dict[str, object]:
    """The GPU's random state *is* the CPU's: saved, restored and seeded for real.

    `is_initialized` must be true: `_lazy_call`, through which megatron restores states, would
    otherwise queue the call for ever, without a word.
    """
    return {
        "is_initialized": lambda: True,
        "get_rng_state": _get_rng_state,
        "set_rng_state": _set_rng_state,
        "manual_seed": _manual_seed,
        "default_generators": _Generators(),
    }


def _memory() -> dict[str, object]:
    return {
        "empty_cache": _nothing,
        "memory_stats": lambda *args, **kwargs: {},
        "reset_peak_memory_stats": _nothing,
        "memory_allocated": lambda *args, **kwargs: 0,
        "max_memory_allocated": lambda *args, **kwargs: 0,
        "memory_reserved": lambda *args, **kwargs: 0,
        "max_memory_reserved": lambda *args, **kwargs: 0,
    }


def _not_about_shared_state(record: logging.LogRecord) -> bool:
    """Drops the tracker's warning that the CPU's random state moved: here it is the one it tracks."""
    return "CPU RNG state changed within GPU RNG context" not in record.getMessage()


def installed() -> bool:
    """Whether this process has been redirected."""
    return hasattr(torch.zeros, "__wrapped__")


def install(device_type: str = "cpu") -> None:
    """Redirect `torch.cuda` and factories to `device_type` (`cpu` or `meta`). A second call does nothing.

    Works before and after the import of megatron-core. Raises RuntimeError where a GPU is present:
    nothing of this may come near a GPU run.
    """
    if installed():
        return
    if torch.cuda.is_available():
        raise RuntimeError("cuda_redirect is for processes without a GPU: hide it (CUDA_VISIBLE_DEVICES='')")
    # dynamo refuses to be imported once two names of torch are one function; core imports it anyway.
    importlib.import_module("torch._dynamo")
    stand_in = torch.device(device_type)
    # `with torch.device("meta")` knows factories by identity: let it list the true ones first.
    _device._device_constructors()
    _put(torch, {name: _redirected(getattr(torch, name), stand_in) for name in FACTORIES})
    _put(torch.cuda, _streams(stand_in) | _random() | _memory() | _types())
    _put(torch.cuda.random, {name: value for name, value in _random().items() if name.endswith("rng_state")})
    _put(torch.cuda.memory, _memory())
    _put(torch.cuda.nvtx, {"range_push": _nothing, "range_pop": _nothing, "range": _profiler_range})
    _put(torch.nn.Module, {"cuda": _itself})
    _put(
        torch.Tensor,
        {
            "cuda": _itself,
            "pin_memory": _itself,
            "record_stream": _nothing,
            "type": _type_name(torch.Tensor.type),
        },
    )
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(_not_about_shared_state)


__all__ = ["CUDA_NAMES", "FACTORIES", "Event", "Stream", "install", "installed"]
