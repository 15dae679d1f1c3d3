"""DeepSeek-V3's FP8 procedure written down once more in NumPy, from the report, slowly and without torch.

Section 3.3 of arXiv 2412.19437. Numbers of a format come from its definition, as a table; nothing here shares
code with `dsplugins.plugins.precision.fp8`.
"""

from __future__ import annotations

import numpy as np


def numbers(exponent_bits, mantissa_bits, top):
    """All finite numbers >= 0 of a format with IEEE's bias and subnormals, up to `top`, in order."""
    bias = 2 ** (exponent_bits - 1) - 1
    found = [m / 2**mantissa_bits * 2.0 ** (1 - bias) for m in range(2**mantissa_bits)]
    for e in range(1, 2**exponent_bits):
        found += [(1 + m / 2**mantissa_bits) * 2.0 ** (e - bias) for m in range(2**mantissa_bits)]
    return np.array([x for x in found if x <= top])


E4M3 = numbers(4, 3, 448.0)
E5M6 = numbers(5, 6, 65024.0)


def nearest(x, table):
    """Each element's nearest number of `table` (ties to the one whose place, hence last bit, is even)."""
    size = np.abs(x.astype(np.float64))
    above = np.clip(np.searchsorted(table, size), 1, len(table) - 1)
    low, high = table[above - 1], table[above]
    up = (high - size < size - low) | ((high - size == size - low) & (above % 2 == 0))
    return np.where(up, high, low) * np.sign(x)


def scale(tile, top, power_of_two):
    largest = max(float(np.abs(tile).max()), float(np.float32(1e-4)))
    plain = np.float32(largest) / np.float32(top)
    return np.float32(2.0 ** np.ceil(np.log2(np.float64(plain)))) if power_of_two else plain


def coded(x, rows, columns, power_of_two=False, table=E4M3):
    """What is left of `x` [M, K] after a trip through the format, tile by tile: float64."""
    x = np.asarray(x, np.float32)
    out = np.zeros(x.shape)
    for i in range(0, x.shape[0], rows):
        for j in range(0, x.shape[1], columns):
            tile = x[i : i + rows, j : j + columns]
            s = scale(tile, table[-1], power_of_two)
            out[i : i + rows, j : j + columns] = nearest((tile / s).astype(np.float32), table) * np.float64(s)
    return out


def linear(x, w, dy, input_po2=False, gradient_po2=False, weight_po2=False, attention_output=False):
    """y, dx, dw of y = x w^T: [T, K], [N, K], [T, N] -> [T, N], [T, K], [N, K], exact sums in float64."""
    weight = coded(w, 128, 128, weight_po2)
    x_codes = coded(x, 1, 128, input_po2)
    y = x_codes @ weight.T
    dx = coded(dy, 1, 128, gradient_po2) @ weight
    stored = coded(x, 1, 128, True, E5M6) if attention_output else x_codes
    # The stored activation is dequantised, transposed and quantised again along the tokens.
    dw = coded(dy.T, 1, 128, gradient_po2) @ coded(stored.T, 1, 128, input_po2).T
    return y, dx, dw


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def swiglu(inner, probs):
    gate, up = np.split(inner, 2, axis=-1)
    return gate * sigmoid(gate) * up * probs[:, None]


def down(inner, probs, w, dy, input_po2=False, gradient_po2=False, weight_po2=False):
    """y, dactive, kept, dw of y = swiglu(inner, probs) w^T: [T, 2I], [T], [N, I], [T, N] -> [T, N], [T, I],
    [T, 2I], [N, I]. `kept` is SwiGLU's input as backward has it, `dactive` the gradient of its output.
    """
    weight = coded(w, 128, 128, weight_po2)
    y = coded(swiglu(inner, probs), 1, 128, input_po2) @ weight.T
    dactive = coded(dy, 1, 128, gradient_po2) @ weight
    kept = coded(inner, 1, 128, input_po2)
    # The weight gradient's other operand is the activation itself, made again: never through a row of codes.
    dw = coded(dy.T, 1, 128, gradient_po2) @ coded(swiglu(kept, probs).T, 1, 128, input_po2).T
    return y, dactive, kept, dw


def difference(a, b):
    """1 - 2 <a, b> / (|a|^2 + |b|^2): what DeepGEMM's tests compare by."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return 1 - 2 * (a * b).sum() / ((a * a).sum() + (b * b).sum())
