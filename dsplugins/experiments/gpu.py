"""What one GPU shows: steps beside a hand-written loop, V3's layers at full width, attention paths.

Each part is measured in a process of its own, so that its peak of memory is its own; see `gpu_part`.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsplugins.manager import Plugins

PARTS: Mapping[str, str] = {
    "step": "a step of bench/large.yaml, and of a hand-written loop over the same modules, in turn",
    "moe_layer": "forward and backward of V3's MoE layer, all 256 experts on this GPU",
    "mla_block": "forward and backward of V3's attention block, with torch_local by cuDNN's attention",
    "attention": "forward and backward of core attention alone, V3's 128 heads of 192 and 128",
    "few_experts": "forward and backward of V3's MoE layer with 16 experts, some 2,000 tokens each",
    "products": "fp8_v3's products of V3's shapes, beside BF16 and the reference",
    "casts": "fp8_v3's casts, beside a copy of as many bytes",
}
"""Part -> what is timed."""
STEP, LAYER = "bench/large.yaml", "deepseek_v3/v3_671b.yaml"
"""Recipes: of the step, and of the other parts."""
PLATFORMS, BACKENDS = ("cpu", "cuda"), ("torch_local", "te")
LIBRARIES = {"te": "transformer_engine"}
"""Backend -> the library that it needs."""
BY_CUDNN = "plugins.torch_local={attention: cudnn}"
"""In the attention block: kernels that torch chooses would hide all else. The part `attention` has both."""
OURS = ("fp8_v3 torch", "fp8_v3 deepgemm")
KEPT = "fp8_v3 deepgemm, weights kept"
"""As in all micro-batches of a step but the first, where `keep_weights` has each weight cast once."""
FORMATS: Mapping[str, tuple[str, ...]] = {
    "bf16": (),
    "fp8_v3 torch": ("plugins.bf16=null", "plugins.fp8_v3={backend: torch}"),
    "fp8_v3 deepgemm": ("plugins.bf16=null", "plugins.fp8_v3={backend: deepgemm}"),
    KEPT: ("plugins.bf16=null", "plugins.fp8_v3={backend: deepgemm, keep_weights: true}"),
    "te_blockwise": (
        *("plugins.bf16=null", "plugins.te_blockwise={}"),
        *("plugins.grouped=null", "plugins.sequential={}"),
    ),
}
"""Number format -> what it overrides in a recipe in BF16."""
NEEDED = 100 * 2**30
"""Bytes for a training pass of the MoE layer: 11.3 billion weights in BF16 are 23 GB, the buffers of their
gradients in FP32 45 GB; a gradient on its way there is 15 GB, for a moment twice; then the activations."""
LAYERS = ("moe_layer", "mla_block", "few_experts")
"""Parts in which number formats are compared."""
FASTER = 1.3
"""What a layer in FP8 is to be beside BF16."""


@dataclass(frozen=True)
class Way:
    """One part with one backend in one number format."""

    part: str
    backend: str
    format: str = "bf16"

    def __str__(self) -> str:
        return ", ".join([self.part, self.backend, *([] if self.format == "bf16" else [self.format])])


def ways(parts: Sequence[str] = ()) -> Iterator[Way]:
    """Those of `parts`, else all, in the order in which they are measured."""
    yield from (way for way in _all_ways() if not parts or way.part in parts)


def _all_ways() -> Iterator[Way]:
    for part in PARTS:
        if part not in ("products", "casts"):
            yield from (Way(part, backend) for backend in BACKENDS)
        if part in LAYERS:
            yield Way(part, "te", "te_blockwise")
        if part in (*LAYERS, "products"):
            yield from (Way(part, "torch_local", form) for form in OURS)
        if part in ("mla_block", "few_experts"):
            yield Way(part, "torch_local", KEPT)
    yield Way("casts", "torch_local", OURS[0])


def changes(way: Way) -> list[str]:
    """What puts the part's recipe on a GPU, with the backend."""
    recipe = STEP if way.part == "step" else LAYER
    return [
        *swapped(recipe, PLATFORMS, "cuda"),
        *swapped(recipe, BACKENDS, way.backend),
        *FORMATS[way.format],
        *([BY_CUDNN] if (way.part, way.backend) == ("mla_block", "torch_local") else []),
    ]


def swapped(recipe: str, choices: Sequence[str], wanted: str) -> Iterator[str]:
    """Overrides that leave `wanted` alone of the plugins `choices`, which fill one slot."""
    from dsplugins.recipe import Recipe

    named = Recipe.load(recipe).plugins
    yield from (f"plugins.{other}=null" for other in choices if other != wanted and other in named)
    if wanted not in named:
        yield f"plugins.{wanted}={{}}"


def lacking(way: Way, overrides: Sequence[str] = ()) -> str | None:
    """What this machine lacks for `way`: a library, or memory of its GPU."""
    import torch

    library = LIBRARIES.get(way.backend)
    if library and importlib.util.find_spec(library) is None:
        return f"{library} is not installed"
    if way.format in (*OURS, KEPT):
        for problem in _precision(way).lacks():
            return str(problem.message)
    if reason := _no_cudnn(way, overrides):
        return reason
    if way.part == "moe_layer" and torch.cuda.is_available():
        there = torch.cuda.get_device_properties(0).total_memory
        if there < NEEDED:
            return f"needs {NEEDED / 2**30:.0f} GiB of GPU memory, this one has {there / 2**30:.0f}"
    return None


def _no_cudnn(way: Way, overrides: Sequence[str]) -> str | None:
    """Why cuDNN's attention, which the attention block takes unless an override says otherwise, can't be."""
    from dsplugins import cudnn
    from dsplugins.experiments.gpu_layer import alone

    if BY_CUDNN not in changes(way):
        return None
    _, plugins, plan = alone([*changes(way), *overrides])
    chosen: Any = next(item.plugin for item in plugins if item.slot == "backend")
    if chosen.options.attention == "cudnn":
        for problem in cudnn.attention("plugins.torch_local.attention", plan):
            return f"{problem.message}: {problem.remedy}"
    return None


def _plugins(way: Way) -> Plugins:
    """Those that it names."""
    if way.part == "step":
        from dsplugins.plan import prepare
        from dsplugins.recipe import Recipe

        return prepare(Recipe.load(STEP, changes(way)))[0]
    from dsplugins.experiments.gpu_layer import alone

    return alone(changes(way))[1]


def _precision(way: Way) -> Any:
    """The plugin of the slot precision that it names."""
    return next(item.plugin for item in _plugins(way) if item.slot == "precision")


def measure(way: Way, overrides: Sequence[str], rounds: int, folder: Path) -> dict[str, Any]:
    """The numbers of `way`; `skipped` says what this machine lacks for it, `failed` how it ended instead.

    What `folder` holds of it already is not measured again.
    """
    from dsplugins import environment
    from dsplugins.launcher import run_local

    if reason := lacking(way, overrides):
        return {**vars(way), "skipped": reason}
    answer = folder / f"{way}.json"
    if answer.exists():
        return {**vars(way), **json.loads(answer.read_text())}
    given = [f"{name}={value}" for name, value in environment.needed(_plugins(way)).items()]
    program = ["env", *given, sys.executable, "-m", "dsplugins.experiments.gpu_part"]
    arguments = [str(answer), way.part, str(rounds), *changes(way), *overrides]
    outcome = run_local(1, (), [*program, *arguments])
    if outcome.code:
        return {**vars(way), "failed": outcome.reason}
    return {**vars(way), **json.loads(answer.read_text())}


def results(
    measured: Sequence[Mapping[str, Any]],
    rounds: int,
    overrides: Sequence[str],
    left: Sequence[Way] = (),
) -> dict[str, Any]:
    """What goes into the record; `left` is still to be measured."""
    return {
        "holds": not left and not any("failed" in row for row in measured),
        "left": [str(way) for way in left],
        "card": card(),
        "rounds": rounds,
        "overrides": list(overrides),
        "parts": {part: PARTS[part] for part in dict.fromkeys(row["part"] for row in measured)},
        "layers": list(layers(measured)),
        "measured": list(measured),
    }


def layers(measured: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Each of our formats in each layer, beside the faster of BF16's backends, and beside te_blockwise."""
    for part in LAYERS:
        seconds = {
            (row["format"], row["backend"]): row["seconds_median"]
            for row in measured
            if row["part"] == part and "seconds_median" in row
        }
        plain = [value for (form, _), value in seconds.items() if form == "bf16"]
        te = [value for (form, _), value in seconds.items() if form == "te_blockwise"]
        for form in (*OURS, KEPT):
            mine = seconds.get((form, "torch_local"))
            if mine and plain:
                ratio = min(plain) / mine
                beside_te = te[0] / mine if te else None
                yield {
                    "part": part,
                    "format": form,
                    "ratio_to_bf16": ratio,
                    "ratio_to_te_blockwise": beside_te,
                    "reached": ratio >= FASTER and (beside_te is None or beside_te >= 1),
                }


def card() -> dict[str, Any]:
    """What the numbers depend on beside the GPU's name; empty without one."""
    import torch

    from dsplugins import cudnn

    if not torch.cuda.is_available():
        return {}
    properties = torch.cuda.get_device_properties(0)
    return {
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "capability": f"{properties.major}.{properties.minor}",
        "processors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "cudnn": cudnn.version(),
    }


def table(found: Mapping[str, Any]) -> list[list[str]]:
    """The record as cells of text: a title, then a line for each number that is compared."""
    cells = [["PART", "BACKEND", "FORMAT", "WHAT", "MS", "RATIO", "PEAK, GiB"]]
    cells += [line for row in found["measured"] for line in lines(row)]
    for row in found["layers"]:
        beside = row["ratio_to_te_blockwise"]
        te = "" if beside is None else f", {beside:.2f} times te_blockwise's"
        said = f"{'reached' if row['reached'] else 'missed'}: at least {FASTER} times BF16's speed{te}"
        cells.append([row["part"], "", row["format"], said, "", f"{row['ratio_to_bf16']:.2f}", ""])
    return cells


def lines(row: Mapping[str, Any]) -> Iterator[list[str]]:
    """What was measured of one way, as cells of the table."""
    yield from ([row["part"], row["backend"], row["format"], *told] for told in _told(row))


def _told(row: Mapping[str, Any]) -> Iterator[list[str]]:
    """What, milliseconds, ratio and peak memory of one way."""
    for word in ("skipped", "failed"):
        if word in row:
            yield [f"{word}: {row[word]}", "", "", ""]
            return
    if row["part"] == "attention":
        for path in row["paths"]:
            if "unavailable" in path:
                yield [f"{path['path']}: unavailable", "", "", ""]
            else:
                said = f"{path['path']}, error {max(path['errors'].values()):.1e}"
                yield [said, _ms(path["seconds_median"]), "", ""]
        return
    if row["part"] in ("products", "casts"):
        yield from _rates(row)
        return
    peak = f"{row['peak_memory'] / 2**30:.2f}"
    if row["part"] == "step":
        yield ["dsplugins", _ms(row["dsplugins_seconds_median"]), f"{row['ratio_of_medians']:.3f}", peak]
        yield ["hand-written", _ms(row["hand_written_seconds_median"]), "1", ""]
    else:
        yield [f"{row['tokens']} tokens", _ms(row["seconds_median"]), "", peak]


def _rates(row: Mapping[str, Any]) -> Iterator[list[str]]:
    """A line for each product, or each cast."""
    for one in row["rows"]:
        if row["part"] == "products":
            speed = f"{one['tflops']:.0f} TFLOP/s, {one['ratio_to_peak']:.2f} of BF16's peak"
            what = f"{one['linear']}, {one['product']}: {speed}, error {one['error']:.1e}"
            ratio = one["ratio_to_bf16"]
        else:
            what, ratio = f"{one['cast']}: {one['gb_per_second']:.0f} GB/s", one["ratio_to_copy"]
        yield [what, _ms(one["seconds_median"]), f"{ratio:.2f}", ""]
    aim = row["aim"]
    yield [f"at least {aim['aim']:g}: {aim['reached']} of {aim['of']}", "", f"{aim['least']:.2f}", ""]


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3f}"
