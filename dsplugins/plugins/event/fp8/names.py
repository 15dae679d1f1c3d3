"""Names of modules that mean the same on every rank: layers by their number in the whole model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from dsplugins.numerics.watch import Watch


def watches(chunks: Sequence[torch.nn.Module]) -> Iterator[tuple[str, Watch]]:
    """(name, watch) of whatever in the chunks of this rank shows what it quantises.

    A module shows its own as `watches`, or those of the products that packed experts are given. Experts of a
    rank share a name, as they share their tensors' fate: the busiest weigh most.
    """
    for chunk in chunks:
        for path, module in chunk.named_modules():
            shown = getattr(module, "watches", None) or getattr(
                getattr(module, "products", None), "watches", {}
            )
            for part, watch in shown.items():
                yield _name(chunk, path, part), watch


def _name(chunk: torch.nn.Module, path: str, part: str) -> str:
    """`decoder.layers.0.mlp.linear_fc1` of the second stage -> `layer 5 mlp.linear_fc1`."""
    above: Any = chunk
    parts, layer, rest = path.split(".") if path else [], "", path
    for index, step in enumerate(parts):
        above = getattr(above, step)
        if hasattr(above, "layer_number") and hasattr(above, "self_attention"):
            depth = parts[parts.index("mtp") + 2] if "mtp" in parts else None
            layer = f"layer {above.layer_number} " if depth is None else f"mtp {int(depth) + 1} "
            rest = ".".join(parts[index + 1 :])
    kept = [step for step in rest.split(".") if step and not step.isdigit() and step != "local_experts"]
    return layer + ".".join([*kept, *([part] if part else [])])
