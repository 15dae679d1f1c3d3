"""Short names of megatron-core's process groups."""

from __future__ import annotations

from typing import Any

NAMES = {
    "TENSOR_MODEL_PARALLEL_GROUP": "tensor",
    "PIPELINE_MODEL_PARALLEL_GROUP": "pipeline",
    "CONTEXT_PARALLEL_GROUP": "context",
    "DATA_PARALLEL_GROUP": "data",
    "DATA_PARALLEL_GROUP_WITH_CP": "data",
    "INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP": "data",
    "EXPERT_MODEL_PARALLEL_GROUP": "expert",
    "EXPERT_TENSOR_PARALLEL_GROUP": "expert-tensor",
    "EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP": "expert x expert-tensor",
    "EXPERT_TENSOR_MODEL_PIPELINE_PARALLEL_GROUP": "experts' model",
    "EXPERT_TENSOR_MODEL_PIPELINE_PARALLEL_GROUP_WITH_EGTP": "experts' model",
    "EXPERT_DATA_PARALLEL_GROUP": "expert-data",
    "INTRA_PARTIAL_EXPERT_DATA_PARALLEL_GROUP": "expert-data",
    "EMBEDDING_GROUP": "embedding",
    "POSITION_EMBEDDING_GROUP": "position embedding",
    "MODEL_PARALLEL_GROUP": "model",
    "TENSOR_AND_DATA_PARALLEL_GROUP": "tensor x data",
    "TENSOR_AND_DATA_PARALLEL_GROUP_WITH_CP": "tensor x data",
    "TENSOR_AND_CONTEXT_PARALLEL_GROUP": "tensor x context",
    "INTRA_DISTRIBUTED_OPTIMIZER_INSTANCE_GROUP": "optimizer",
    "default_pg": "world",
}
"""`group_desc` that megatron-core (parallel_state.py) and torch give their groups -> what we call them."""


def name(group: Any) -> str:
    """What a process group is called; `other` where it is neither core's nor the world."""
    return NAMES.get(group.group_desc, "other")
