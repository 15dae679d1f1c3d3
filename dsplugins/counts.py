"""How many parameters a model has, and how many of them a token uses; counted on the built modules."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.experimental_attention_variant.dsa import DSAttention
from megatron.core.transformer.multi_latent_attention import MultiLatentAttention

from dsplugins import routers
from dsplugins.model import bare


@dataclass(frozen=True)
class Counts:
    """Trainable parameters, each counted once, whatever the layout; correction biases apart.

    Counts of several pipeline stages add up to those of the model.
    """

    embedding: int = 0
    head: int = 0
    dense: int = 0
    """Decoder without the routed experts: attention, norms, dense FFNs, shared experts, gates."""
    experts: int = 0
    """Routed experts of the decoder."""
    biases: int = 0
    """Persistent buffers of the decoder's routers: they choose experts and get no gradient."""
    mtp_dense: int = 0
    mtp_experts: int = 0
    mtp_biases: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*map(sum, zip(astuple(self), astuple(other), strict=True)))

    @property
    def model(self) -> int:
        """Without MTP."""
        return self.embedding + self.head + self.dense + self.experts

    @property
    def mtp(self) -> int:
        """What MTP adds; embedding and head are the model's."""
        return self.mtp_dense + self.mtp_experts

    def activated(self, share: float) -> int:
        """Those that one token meets without MTP, embedding and head included; `share` is topk / experts."""
        return self.embedding + self.head + self.dense + round(self.experts * share)

    def mtp_activated(self, share: float) -> int:
        """The same of MTP alone, without embedding and head."""
        return self.mtp_dense + round(self.mtp_experts * share)

    def rows(self, share: float) -> dict[str, dict[str, int]]:
        """What is said of a model: name -> `trainable`, and the same `with_correction_biases`.

        Activated are counted in three ways, since published numbers differ in whether the embedding, the
        head or neither is in them (DeepSeek-V3: 37.6B, 36.6B with the head only, 35.7B).
        """
        whole, biases, mtp_biases = self.activated(share), self.biases, self.mtp_biases
        rows = {
            "model": (self.model, biases),
            "embedding": (self.embedding, 0),
            "head": (self.head, 0),
            "activated_embedding_and_head": (whole, biases),
            "activated_head_only": (whole - self.embedding, biases),
            "activated_neither": (whole - self.embedding - self.head, biases),
        }
        if self.mtp:
            rows["mtp"] = (self.mtp, mtp_biases)
            rows["mtp_activated"] = (self.mtp_activated(share), mtp_biases)
            rows["model_and_mtp"] = (self.model + self.mtp, biases + mtp_biases)
        return {
            name: {"trainable": count, "with_correction_biases": count + more}
            for name, (count, more) in rows.items()
        }


def share(config: Any) -> float:
    """Part of the routed experts that a token goes to."""
    return config.moe_router_topk / config.num_moe_experts if config.num_moe_experts else 0.0


def of_stage(chunks: Sequence[torch.nn.Module]) -> Counts:
    """The pipeline stage that this rank belongs to, from this rank's chunks alone.

    Tensor- and expert-parallel shards count as often as there are of them, copies over data parallel
    once, and the MTP stage's copy of the embedding not at all.
    """
    found = dict.fromkeys(Counts.__dataclass_fields__, 0)
    for chunk in map(bare, chunks):
        copies = {id(parameter) for parameter in copied(chunk)}
        for name, parameter in chunk.named_parameters():
            if id(parameter) not in copies and parameter.requires_grad:
                found[_kind(name)] += parameter.numel() * _shards(name, parameter)
    for name, router in routers.local(chunks):
        found["mtp_biases" if name.startswith("mtp.") else "biases"] += _kept(router)
    return Counts(**found)


def of_model(chunks: Sequence[torch.nn.Module]) -> Counts:
    """The whole model, from a rank of a run; collective over all ranks."""
    mine = astuple(of_stage(chunks))
    summed = torch.tensor(mine, dtype=torch.int64, device=next(chunks[0].parameters()).device)
    torch.distributed.all_reduce(summed)
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    ranks = torch.distributed.get_world_size() // stages
    return Counts(*(count // ranks for count in summed.tolist()))


def kept_a_token(chunks: Sequence[torch.nn.Module]) -> int | None:
    """Numbers that decoding keeps of a token for the attention of these chunks' decoder layers.

    Latent attention: the latent and the rotated key (61 x (512 + 64) for DeepSeek-V3: 70,272 bytes in BF16).
    Core's other one: keys and values of each group. None where a layer has another attention. Without MTP.
    """
    return total(map(_kept_by, _attentions(chunks)))


def _kept_by(attention: Any) -> int | None:
    config = attention.config
    if isinstance(attention, MultiLatentAttention):
        return int(config.kv_lora_rank + config.qk_pos_emb_head_dim)
    return int(2 * config.num_query_groups * config.kv_channels) if _plain(attention) else None


def multiplied_a_pair(chunks: Sequence[torch.nn.Module]) -> int | None:
    """Multiply-adds of one query with one key and its value, over heads and these chunks' decoder layers.

    61 x 128 x (192 + 128) for DeepSeek-V3. An attention derived from core's is taken to meet all keys that a
    causal mask leaves; None where it says otherwise, by core's sparse part or a window, and where a layer has
    another attention. Without MTP.
    """
    return total(map(_pair_of, _attentions(chunks)))


def total(parts: Iterable[int | None]) -> int | None:
    """Their sum; None where one of them is not known."""
    known = list(parts)
    return None if None in known else sum(filter(None, known))


def _attentions(chunks: Sequence[torch.nn.Module]) -> list[Any]:
    return [layer.self_attention for chunk in map(bare, chunks) for layer in chunk.decoder.layers]


def _pair_of(attention: Any) -> int | None:
    config = attention.config
    sparse = any(isinstance(part, DSAttention) for part in attention.children())
    if sparse or config.window_size is not None:
        return None
    if isinstance(attention, MultiLatentAttention):
        width = config.qk_head_dim + config.qk_pos_emb_head_dim + config.v_head_dim
        return int(config.num_attention_heads * width)
    return int(2 * config.num_attention_heads * config.kv_channels) if _plain(attention) else None


def _plain(attention: Any) -> bool:
    """Core's attention of keys and values, not another way to compute latent attention."""
    return isinstance(attention, Attention) and not attention.config.multi_latent_attention


def parameters(config: Any, chunks: Sequence[torch.nn.Module]) -> tuple[int, int]:
    """(trainable, activated a token) of the whole model with MTP, embedding and head; collective."""
    counts = of_model(chunks)
    part = share(config)
    return counts.model + counts.mtp, counts.activated(part) + counts.mtp_activated(part)


def copied(chunk: Any) -> list[torch.nn.Parameter]:
    """Parameters of a chunk that another stage owns: MTP's copy of the embedding, kept equal by core."""
    embedding = getattr(chunk, "embedding", None)
    return list(embedding.parameters()) if embedding is not None and not chunk.pre_process else []


def _kept(router: torch.nn.Module) -> int:
    """Elements of a router's own buffers that are saved."""
    lost = router._non_persistent_buffers_set
    return sum(x.numel() for name, x in router.named_buffers(recurse=False) if name not in lost)


def _kind(name: str) -> str:
    first = name.split(".", 1)[0]
    if first == "embedding":
        return "embedding"
    if first == "output_layer":
        return "head"
    return ("mtp_" if first == "mtp" else "") + ("experts" if ".experts." in name else "dense")


def _shards(name: str, parameter: torch.Tensor) -> int:
    """Different shards of this parameter within a pipeline stage."""
    if ".experts." in name:
        tensor = parallel_state.get_expert_tensor_parallel_world_size()
        return parallel_state.get_expert_model_parallel_world_size() * tensor
    if getattr(parameter, "tensor_model_parallel", False):
        return parallel_state.get_tensor_model_parallel_world_size()
    return 1


__all__ = [
    "Counts",
    "copied",
    "kept_a_token",
    "multiplied_a_pair",
    "of_model",
    "of_stage",
    "parameters",
    "share",
    "total",
]
