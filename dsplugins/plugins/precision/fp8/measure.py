"""An arithmetic measured: V3's products beside BF16, the casts before them beside a copy of as many bytes.

Shape legend: T tokens, N outputs, K inputs of a linear, E experts.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from dsplugins.numerics.tiles import SMALLEST_GRADIENT, Quantised
from dsplugins.plugins.precision.fp8.reference import Reference
from dsplugins.plugins.precision.fp8.swiglu import SwigluKept

if TYPE_CHECKING:
    from dsplugins.plugins.precision.fp8.arithmetic import Arithmetic

SHAPES: Mapping[str, tuple[int, int, int]] = {
    "q and kv down": (1, 2112, 7168),
    "kv down": (1, 576, 7168),
    "q up": (1, 24576, 1536),
    "kv up": (1, 32768, 512),
    "attention output": (1, 7168, 16384),
    "gate and up": (1, 4096, 7168),
    "down": (1, 7168, 2048),
    "8 experts, gate and up": (8, 4096, 7168),
    "8 experts, down": (8, 7168, 2048),
}
"""E, N, K: the shapes that DeepGEMM's tests take from V3, and two of them for a rank's experts."""
TOKENS = 4096
"""Of each linear or expert: a sequence, and what V3's micro-batches bring an expert with EP64 in the mean."""
CAST = 32768
"""Tokens that a cast is measured with: 470 MB in BF16, more than a cache holds, and long beside its start."""
SMALL = {"small": (2, 96, 64)}
"""In the place of SHAPES where a CPU does it, in tests."""
WIDTH = 7168
"""V3's hidden size."""
FASTER, OF_A_COPY = 1.6, 0.8
"""What is aimed at: a product's rate over BF16's, a cast's bytes a second over a copy's."""
PEAK = 8192
"""M, N, K of the product that a card's BF16 peak is measured by."""

Clock = Callable[[Callable[[], object]], list[float]]
"""Seconds of some calls, each to its end."""


@dataclass(frozen=True)
class Operands:
    """A linear's, or E experts', numbers: x [E * T, K], weight [E, N, K], dy [E * T, N]."""

    x: torch.Tensor
    weight: torch.Tensor
    dy: torch.Tensor

    @property
    def splits(self) -> list[int]:
        """Tokens of each expert."""
        return [len(self.x) // len(self.weight)] * len(self.weight)


def drawn(shape: tuple[int, int, int], tokens: int, device: torch.device) -> Operands:
    """N(0, 1) activations and gradients, weights of V3's initial size, BF16."""
    experts, outputs, inputs = shape
    generator = torch.Generator(device).manual_seed(0)

    def noise(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator, device=device, dtype=torch.float32).bfloat16()

    weight = noise(experts, outputs, inputs) * 0.006
    return Operands(noise(experts * tokens, inputs), weight, noise(experts * tokens, outputs))


def passes(arithmetic: Arithmetic, given: Operands) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
    """The three products, from operands that are quantised before.

    Measured is all that stands between those and a result, laying out the runs of experts as well.
    """
    splits, half = given.splits, torch.bfloat16
    x, dy = arithmetic.rows(given.x, False), arithmetic.rows(given.dy, False, SMALLEST_GRADIENT)
    weight = arithmetic.blocks(given.weight, False)
    turned = arithmetic.blocks(given.weight, False, transposed=True)
    yield "fprop", lambda: arithmetic.product(x, weight, splits, half)
    yield "dgrad", lambda: arithmetic.product(dy, turned, splits, half)
    left = arithmetic.columns(given.dy, splits, False, SMALLEST_GRADIENT)
    right = arithmetic.columns(given.x, splits, False)
    sums = torch.zeros(given.weight.shape, device=given.weight.device)

    def add() -> torch.Tensor:
        arithmetic.weight_gradient(left, right, sums)
        return sums

    yield "wgrad", add


def plain(given: Operands) -> dict[str, Callable[[], torch.Tensor]]:
    """The same in BF16."""
    experts = len(given.weight)
    x, dy = (tensor.view(experts, -1, tensor.shape[1]) for tensor in (given.x, given.dy))
    return {
        "fprop": lambda: x @ given.weight.mT,
        "dgrad": lambda: dy @ given.weight,
        "wgrad": lambda: dy.mT @ x,
    }


def products(arithmetic: Arithmetic, device: torch.device, clock: Clock) -> dict[str, Any]:
    """Rows of V3's shapes, how many of them reach what is aimed at, and the card's own BF16 peak."""
    small = device.type == "cpu"
    shapes, tokens = (SMALL, 32) if small else (SHAPES, TOKENS)
    peak = peak_tflops(64 if small else PEAK, device, clock)
    rows = rates(arithmetic, shapes, tokens, device, clock)
    for row in rows:
        row["ratio_to_peak"] = row["tflops"] / peak
    return {"rows": rows, "aim": reached(rows, "ratio_to_bf16", FASTER), "bf16_peak_tflops": peak}


def casts(arithmetic: Arithmetic, device: torch.device, clock: Clock) -> dict[str, Any]:
    """Rows of the casts of a sequence of V3's width, and how many reach what is aimed at."""
    tokens, width = (64, 256) if device.type == "cpu" else (CAST, WIDTH)
    rows = speeds(arithmetic, tokens, width, device, clock)
    return {"rows": rows, "aim": reached(rows, "ratio_to_copy", OF_A_COPY)}


def rates(
    arithmetic: Arithmetic,
    shapes: Mapping[str, tuple[int, int, int]],
    tokens: int,
    device: torch.device,
    clock: Clock,
) -> list[dict[str, Any]]:
    """A row for each shape and product: its rate, BF16's, and its distance from the reference's result."""
    rows = []
    for name, shape in shapes.items():
        given = drawn(shape, tokens, device)
        exact, half = dict(passes(Reference(), given)), plain(given)
        for which, call in passes(arithmetic, given):
            error = distance(call(), exact[which]())  # before weight gradients are added up
            seconds, other = (statistics.median(clock(one)) for one in (call, half[which]))
            work = 2 * tokens * shape[0] * shape[1] * shape[2]
            rows.append(
                {
                    "linear": name,
                    "shape": list(shape),
                    "product": which,
                    "seconds_median": seconds,
                    "tflops": work / seconds / 1e12,
                    "bf16_tflops": work / other / 1e12,
                    "ratio_to_bf16": other / seconds,
                    "error": error,
                }
            )
    return rows


def speeds(
    arithmetic: Arithmetic, tokens: int, width: int, device: torch.device, clock: Clock
) -> list[dict[str, Any]]:
    """A row for each cast: bytes read and written a second, beside those of a copy of as many."""
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(tokens, width, generator=generator, device=device).bfloat16()
    probs = torch.rand(tokens, generator=generator, device=device)
    kept, packed = arithmetic.rows(x, True), arithmetic.pack(x)
    inner, dy = SwigluKept(kept, probs, x.dtype), x[:, : width // 2].contiguous()
    small = packed.bytes.numel() + 4 * packed.scales.numel()
    calls: dict[str, tuple[int, Callable[[], object]]] = {
        "rows": (2 * x.numel() + _size(kept), lambda: arithmetic.rows(x, True)),
        "columns": (2 * x.numel() + _size(kept), lambda: arithmetic.columns(x, [tokens], True)),
        "columns of codes": (2 * _size(kept), lambda: arithmetic.columns(kept, [tokens], True)),
        "blocks": (3 * x.numel(), lambda: arithmetic.blocks(x[None], True)),
        "blocks, transposed": (3 * x.numel(), lambda: arithmetic.blocks(x[None], True, transposed=True)),
        "SwiGLU and rows": (
            2 * x.numel() + _size(kept) // 2,
            lambda: arithmetic.swiglu_rows(x, probs, True),
        ),
        "SwiGLU and columns": (
            _size(kept) + _size(kept) // 2,
            lambda: arithmetic.swiglu_columns(inner, [tokens], True),
        ),
        "SwiGLU's gradient": (
            _size(kept) + dy.numel() * 2 + 2 * x.numel(),
            lambda: arithmetic.swiglu_gradient(inner, dy),
        ),
        "E5M6": (2 * x.numel() + small, lambda: arithmetic.pack(x)),
        "from E5M6": (small + 2 * x.numel(), lambda: arithmetic.unpack(packed)),
    }
    rows = []
    for name, (moved, call) in calls.items():
        source = torch.empty(moved // 2, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        seconds, copied = (
            statistics.median(clock(one)) for one in (call, lambda a=target, b=source: a.copy_(b))
        )
        rows.append(
            {
                "cast": name,
                "seconds_median": seconds,
                "gb_per_second": moved / seconds / 1e9,
                "copy_gb_per_second": moved / copied / 1e9,
                "ratio_to_copy": copied / seconds,
            }
        )
    return rows


def peak_tflops(size: int, device: torch.device, clock: Clock) -> float:
    """Of a product of two random BF16 matrices of `size` squared."""
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    return 2 * size**3 / statistics.median(clock(lambda: a @ b)) / 1e12


def distance(mine: torch.Tensor, exact: torch.Tensor) -> float:
    """|mine - exact| / |exact|."""
    return float((mine.float() - exact.float()).norm() / exact.float().norm())


def _size(q: Quantised) -> int:
    """Bytes of codes and scales."""
    return q.codes.numel() + 4 * q.scales.numel()


def reached(rows: Sequence[Mapping[str, Any]], key: str, aim: float) -> dict[str, Any]:
    """How many of the rows reach what is aimed at, and the least."""
    values = [row[key] for row in rows]
    return {"aim": aim, "of": len(values), "reached": sum(v >= aim for v in values), "least": min(values)}
