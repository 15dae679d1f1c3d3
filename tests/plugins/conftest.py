"""Triton kernels on CPU tensors, for the tests of plugins that have some."""

from __future__ import annotations

import importlib.util
import sys

import numpy as np
import pytest
import torch


def cast(values, was, wanted, rounding):
    """torch's casts: those of Triton's interpreter lose carries, ties and E4M3's NaN."""
    import triton.language as tl
    from triton.runtime import interpreter

    types = {
        tl.float32: (torch.float32, np.uint32),
        tl.bfloat16: (torch.bfloat16, np.uint16),
        tl.float16: (torch.float16, np.uint16),
        tl.float8e4nv: (torch.float8_e4m3fn, np.uint8),
    }
    if was not in types or wanted not in types:
        return interpreter.original(values, was, wanted, rounding)
    (source, _), (target, carrier) = types[was], types[wanted]
    given = torch.frombuffer(bytearray(values.tobytes()), dtype=source)
    made = given.to(target).view(torch.uint8).numpy()
    return np.frombuffer(made.tobytes(), carrier).reshape(np.shape(values))


def fma(self, x, y, z):
    """Rounded once, as a GPU does. A product of float32 is exact in float64; a sum there is rounded to odd,
    after which rounding to float32 is right (Boldo and Melquiond, IEEE Trans. Computers 57, 2008).
    """
    from triton.runtime.interpreter import TensorHandle

    product, other = x.data.astype(np.float64) * y.data.astype(np.float64), z.data.astype(np.float64)
    with np.errstate(invalid="ignore"):  # infinities and NaN go through
        total = product + other
        part = total - product
        rest = (product - (total - part)) + (other - part)  # what rounding took from the sum
    even = np.isfinite(rest) & (rest != 0) & (np.ascontiguousarray(total).view(np.int64) % 2 == 0)
    total = np.where(even, np.nextafter(total, np.copysign(np.inf, rest)), total)
    return TensorHandle(total.astype(np.float32), z.dtype.scalar)


@pytest.fixture
def interpreted(monkeypatch):
    """The kernels of `casts` and `payload_casts` run by Triton's interpreter, on CPU tensors.

    Triton decides on import who runs a function. Here that is changed afterwards, in its library of functions
    and for a second copy of the kernels: other tests compile them.
    """
    pytest.importorskip("triton")
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.jit import JITFunction

    from dsplugins.numerics import tile_kernels
    from dsplugins.plugins.dispatcher import payload_casts, payload_kernels
    from dsplugins.plugins.precision.fp8 import casts, e5m6_kernels, kernels, swiglu_kernels

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for name, function in list(vars(tl.standard).items()):
        if isinstance(function, JITFunction):
            run = interpreter.InterpretedFunction(function.fn)
            for module in (tl.standard, tl):
                monkeypatch.setattr(module, name, run, raising=False)
    monkeypatch.setattr(interpreter, "original", interpreter._convert_float, raising=False)
    monkeypatch.setattr(interpreter, "_convert_float", cast)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", fma)
    of_casts = (kernels, swiglu_kernels, e5m6_kernels)
    for original in (tile_kernels, payload_kernels, *of_casts):  # each after those that it imports
        spec = importlib.util.spec_from_file_location(original.__name__, original.__file__)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        user = {payload_kernels: payload_casts} | dict.fromkeys(of_casts, casts)
        if original in user:
            monkeypatch.setattr(user[original], spec.name.rpartition(".")[2], module)
