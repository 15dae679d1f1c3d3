"""What tensor parallelism with sequence parallelism sends in a micro-batch, forward and backward.

A column-parallel linear gathers its input, in backward once more for its weight's gradient, and scatters the
sum of its input's gradients; a row-parallel one scatters the sum of its outputs and gathers their gradients
(arXiv 2205.05198, section 4.2.2; megatron-core's tensor_parallel/layers.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dsplugins.plugins.event.wire.tally import Key

if TYPE_CHECKING:
    from dsplugins.plugins.event.wire.prediction import Rank

FP32, INT64 = 4, 8


@dataclass(frozen=True)
class Columns:
    """Widths that are gathered and scattered, in numbers a token, summed over the calls."""

    gathered: int = 0
    scattered: int = 0

    def __add__(self, other: Columns) -> Columns:
        return Columns(self.gathered + other.gathered, self.scattered + other.scattered)

    def __mul__(self, times: int) -> Columns:
        return Columns(self.gathered * times, self.scattered * times)


def column(width: int) -> Columns:
    """A column-parallel linear with so wide an input."""
    return Columns(2 * width, width)


def row(width: int) -> Columns:
    """A row-parallel linear with so wide an output, and the embedding."""
    return Columns(width, width)


def regathered(width: int) -> Columns:
    """A column-parallel output, put together and then cut along the sequence: gathered, and its gradient."""
    return Columns(2 * width, 0)


def latent_attention(config: Any) -> Columns:
    """MLA as `plugins/attention/latent_attention.py` runs it: down, whole, cut, up, out."""
    hidden, query, rope = config.hidden_size, config.q_lora_rank, config.qk_pos_emb_head_dim
    keys = config.kv_lora_rank
    down = column(hidden) * 2 + regathered(query) + regathered(keys + rope)
    key = Columns(rope, rope)  # the shared rotary key, gathered once more, its gradient summed
    return down + key + column(query) + column(keys) + row(hidden)


def tensor_parallel(rank: Rank) -> Iterator[tuple[Key, float]]:
    """Payloads of a micro-batch. Nothing for what is not known here: other attention, other backends,
    recompute, experts that are cut themselves; the table shows what these send as not predicted.
    """
    config, layout = rank.config, rank.layout
    if not _known(rank):
        return
    total = Columns()
    for layer in rank.layers:
        total += latent_attention(config)
        if not hasattr(layer.mlp, "router") or config.moe_shared_expert_intermediate_size:
            total += column(config.hidden_size) + row(config.hidden_size)
    embeddings, heads, depths = _ends(rank)
    hidden = config.hidden_size
    total += row(hidden) * embeddings + column(hidden) * heads
    total += (column(2 * hidden) + regathered(hidden)) * depths
    numbers = rank.tokens * rank.width
    greedy = depths * rank.tokens * layout.tensor * (rank.width + INT64)  # core counts MTP's right guesses
    yield Key("all_gather", "tensor"), total.gathered * numbers + greedy
    yield Key("reduce_scatter", "tensor"), total.scattered * numbers
    yield Key("all_reduce", "tensor"), 3 * heads * rank.tokens * FP32  # cross entropy: maximum, target, sum


def _known(rank: Rank) -> bool:
    """Whether all of the traffic in the tensor group is what this module has formulas for."""
    slots = rank.plan.slots
    local = slots.get("attention") == "mla" and slots.get("backend") == "torch_local"
    local = local and slots.get("precision") in ("bf16", "fp32")  # others may have linears of their own
    whole = "recompute" not in slots and rank.layout.expert_tensor == 1
    return rank.layout.tensor > 1 and local and whole and bool(rank.config.q_lora_rank)


def _ends(rank: Rank) -> tuple[int, int, int]:
    """How often embedding and head run here, and how many of MTP's blocks."""
    depths = sum(len(chunk.mtp.layers) for chunk in rank.chunks if getattr(chunk, "mtp", None) is not None)
    first = sum(bool(chunk.pre_process) for chunk in rank.chunks)
    last = sum(bool(chunk.post_process) for chunk in rank.chunks)
    return first + depths, last + depths, depths


def replicated_gradients(rank: Rank) -> float:
    """Bytes of FP32 gradients of what each tensor-parallel rank holds whole: norms, routers. Once a step."""
    if not _known(rank):
        return 0  # half a prediction would look like a wrong one
    held = (p for chunk in rank.chunks for p in chunk.parameters() if getattr(p, "sequence_parallel", False))
    return FP32 * sum(parameter.numel() for parameter in held)
