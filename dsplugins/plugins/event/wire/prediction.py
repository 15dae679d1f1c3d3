"""What a step sends, told beforehand: from the recipe's sizes and from the shapes of this rank's parameters.

Payloads in bytes, as `tally.Traffic` defines them. Letters: S sequence, B micro-batch, M micro-batches a rank
and step, H hidden, E experts, K experts a token, T tokens of a rank that go to experts, V vocabulary rows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from dsplugins.contracts import Layout, Plan, Settings
from dsplugins.plugins.event.wire.tally import Key
from dsplugins.plugins.event.wire.tensor import replicated_gradients, tensor_parallel

FP32, INT64 = 4, 8

Payload = tuple[Key, float]


@dataclass(frozen=True)
class Rank:
    """What the prediction knows of one rank."""

    plan: Plan
    settings: Settings
    chunks: Sequence[Any]
    """Bare model chunks: names and shapes of parameters, which layers have experts."""
    stage: int
    """Its place in the pipeline."""

    @property
    def layout(self) -> Layout:
        """Sizes of the groups."""
        return self.plan.layout

    @property
    def config(self) -> Any:
        """megatron-core's configuration of the model."""
        return self.settings.model

    @property
    def width(self) -> int:
        """Bytes of one number of an activation."""
        return int(self.config.params_dtype.itemsize)

    @property
    def tokens(self) -> int:
        """S x B of a micro-batch."""
        return self.plan.data.seq_length * self.plan.train.micro_batch // self.layout.context

    @cached_property
    def layers(self) -> list[Any]:
        """Transformer layers that stand here, MTP's among them."""
        return [layer for chunk in self.chunks for layer in (*chunk.decoder.layers, *_mtp_layers(chunk))]

    @cached_property
    def expert_layers(self) -> int:
        """How many of them have experts."""
        return sum(hasattr(layer.mlp, "router") for layer in self.layers)


def bare(chunk: Any) -> Any:
    """The model chunk inside its wrappers."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def _mtp_layers(chunk: Any) -> list[Any]:
    mtp = getattr(chunk, "mtp", None)
    return [layer.mtp_model_layer for layer in mtp.layers] if mtp is not None else []


def predict(rank: Rank, micro_batches: int) -> dict[Key, float]:
    """Payload of one step by kind and group, of what can be told; groups of one rank send nothing.

    To the byte, but for all-to-all: there the mean over the ranks is exact, and each rank's share is the
    routers' choice.
    """
    found: dict[Key, float] = defaultdict(float)
    for key, payload in (*_weights(rank), *_loop(rank)):
        found[key] += payload
    for key, payload in (*_experts(rank), *_pipeline(rank), *tensor_parallel(rank)):
        found[key] += payload * micro_batches
    return {key: payload for key, payload in found.items() if payload}


# -- once a step --------------------------------------------------------------------------------------


def _weights(rank: Rank) -> Iterator[Payload]:
    """Gradients to their owners and weights back (ZeRO), or gradients summed everywhere."""
    ddp, layout = rank.settings.ddp, rank.layout
    groups = {False: ("data", layout.data * layout.context), True: ("expert-data", layout.expert_data)}
    for experts, weight, gradient, elements in _buffers(rank):
        group, ranks = groups[experts]
        if ranks == 1:
            continue
        kind = "reduce_scatter" if ddp.use_distributed_optimizer else "all_reduce"
        yield Key(kind, group), elements * gradient
        if ddp.use_distributed_optimizer:
            yield Key("all_gather", group), elements * weight


def _buffers(rank: Rank) -> Iterator[tuple[bool, int, int, int]]:
    """(of experts, bytes a weight, bytes a gradient, elements with padding) of each of DDP's buffers."""
    from dsplugins import gradient_buffers

    ddp, layout = rank.settings.ddp, rank.layout
    for index, chunk in enumerate(rank.chunks):
        shares = layout.data * layout.context, layout.expert_data
        bucket = gradient_buffers.bucket_size(
            ddp, layout.data, first_chunk=index == 0, first_stage=rank.stage == 0
        )
        for key, cut in gradient_buffers.layout(chunk, ddp, bucket, *shares).layouts.items():
            elements = max(end for _, end in cut.bucket_indices)
            yield key.is_expert_parallel, key.param_dtype.itemsize, key.grad_dtype.itemsize, elements


def _loop(rank: Rank) -> Iterator[Payload]:
    """Sums that the loop and core make once a step: tiny, but they are waited for."""
    config, layout = rank.config, rank.layout
    experts, layers = config.num_moe_experts or 0, _expert_layers_of_all(config)
    if layout.world_size > 1:
        flags = 2 * FP32
        yield Key("all_reduce", "world"), (3 + layers * experts) * INT64 + flags
        yield from _norm(rank)
    if layout.tensor * layout.data * layout.context > 1:
        yield Key("all_reduce", "tensor x data"), rank.expert_layers * (experts + 1) * FP32
    yield Key("all_reduce", "tensor"), replicated_gradients(rank)
    ends = (0, layout.pipeline - 1)
    if layout.pipeline > 1 and rank.stage in ends and config.mtp_num_layers:
        rows = rank.settings.vocab_size // layout.tensor  # both ends hold MTP's embedding
        yield Key("all_reduce", "embedding"), rows * config.hidden_size * FP32


def _norm(rank: Rank) -> Iterator[Payload]:
    """The gradient norm, for clipping: one number over whoever holds a part of what is optimized."""
    layout = rank.layout
    if rank.settings.optimizer.clip_grad <= 0:
        return
    if rank.settings.ddp.use_distributed_optimizer:
        yield Key("all_reduce", "optimizer"), FP32
        return
    if layout.tensor * layout.pipeline > 1:
        yield Key("all_reduce", "model"), FP32
    experts = any(not getattr(p, "allreduce", True) for chunk in rank.chunks for p in chunk.parameters())
    if experts and layout.expert * layout.expert_tensor * layout.pipeline > 1:
        yield Key("all_reduce", "experts' model"), FP32


def _expert_layers_of_all(config: Any) -> int:
    """Layers with experts in the whole model."""
    if not config.num_moe_experts:
        return 0
    frequency = config.moe_layer_freq
    if isinstance(frequency, int):
        frequency = [int(i % frequency == 0) for i in range(config.num_layers)]
    return sum(frequency) + (config.mtp_num_layers or 0) * frequency[-1]


# -- once a micro-batch -------------------------------------------------------------------------------


def _experts(rank: Rank) -> Iterator[Payload]:
    """Tokens to their experts and back, and their gradients, by the dispatcher's way of doing it."""
    config, layout = rank.config, rank.layout
    ranks = layout.expert * layout.expert_tensor
    if ranks == 1 or not rank.expert_layers:
        return
    probability = {"fp32": FP32, "fp64": 2 * FP32}.get(config.moe_router_dtype, rank.width)
    tokens, experts = rank.tokens // layout.tensor, config.num_moe_experts
    hidden = config.hidden_size * rank.width
    both = "expert x expert-tensor"
    if config.moe_token_dispatcher_type == "alltoall":
        yield Key("all_gather", both), rank.expert_layers * ranks * experts * INT64  # how many go where
        told = config.moe_expert_capacity_factor is None and not config.moe_router_padding_for_quantization
        if layout.expert > 1 and told:
            # There and back, forward and backward; the probabilities go along on the way there.
            copies, dispatched = tokens * config.moe_router_topk, _dispatched(rank, hidden)
            each = 2 * (dispatched + hidden + probability)
            yield Key("all_to_all", "expert"), rank.expert_layers * copies * each
    elif config.moe_token_dispatcher_type == "allgather":
        summed = config.hidden_size * probability  # outputs are summed in the probabilities' format
        gathered = experts * (1 + probability) + hidden + summed
        scattered = experts * probability + hidden + summed
        yield Key("all_gather", both), rank.expert_layers * ranks * tokens * gathered
        yield Key("reduce_scatter", both), rank.expert_layers * ranks * tokens * scattered


def _dispatched(rank: Rank, hidden: int) -> int:
    """Bytes of a token on its way to an expert: its dispatcher may have a format of its own."""
    experts = next(layer.mlp for layer in rank.layers if hasattr(layer.mlp, "router"))
    own = getattr(experts.token_dispatcher, "dispatched_bytes", None)
    return hidden if own is None else int(own(rank.width))


def _pipeline(rank: Rank) -> Iterator[Payload]:
    """Activations to the next stage and gradients to the one before, for each chunk."""
    layout, config = rank.layout, rank.config
    if layout.pipeline == 1:
        return
    last = layout.pipeline * layout.virtual_pipeline - 1
    places = [rank.stage + chunk * layout.pipeline for chunk in range(layout.virtual_pipeline)]
    messages = sum((place < last) + (place > 0) for place in places)
    payload = messages * rank.tokens // layout.tensor * config.hidden_size * rank.width
    sends = receives = "pipeline"
    if layout.pipeline == 2 and not config.batch_p2p_comm:
        # Core keeps the two directions between two stages apart by sending one through the world's group.
        sends, receives = ("pipeline", "world") if rank.stage == 0 else ("world", "pipeline")
    yield Key("send", sends), payload
    yield Key("recv", receives), payload
