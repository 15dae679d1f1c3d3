"""How far training has taken a model's weights, beside how far rounding to E4M3 takes them.

Rounding is off by a share of each weight, and a weight is where it started plus what it has learned. So
early in training rounding weighs as much as learning, however little it is of the weight.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from dsplugins.checkpoint.store import finished
from dsplugins.numerics.tiles import SQUARE, dequantise, quantise
from dsplugins.recipe import Recipe
from dsplugins.weights import name_key, normal

WEIGHTS = "weights/"
HIGH = ("embedding.", "output_layer.", ".router.", "eh_proj.")
"""In the names of matrices that FP8 leaves alone."""


def moved(run: Path) -> dict[str, Any]:
    """Of the matrices that `fp8_v3` rounds, in the newest checkpoint of a `run`: medians of |W - W0| / |W0|
    and of |Q(W) - W| / |W - W0|, in percent; W0 is where W started, Q rounds by blocks of 128 x 128.
    """
    recipe = Recipe.load(run / "recipe.resolved.yaml")
    seed, std = recipe.sections["train"]["seed"], recipe.sections["model"]["init_method_std"]
    matrices = _matrices(finished(run / "checkpoints")[0].path)
    shares = []
    for name, weight in matrices.items():
        start = _start(name, weight, seed, std)
        learned = (weight - start).norm()
        shares.append((float(learned / start.norm()), float(_rounding(weight).norm() / learned)))
    come, rounded = torch.tensor(shares).median(dim=0).values.tolist()
    return {
        "seed": seed,
        "matrices": len(matrices),
        "learned_percent_of_start": round(100 * come, 3),
        "rounding_percent_of_learned": round(100 * rounded, 3),
    }


def _matrices(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Name -> FP32 [..., N, K]; experts may be stacked."""
    reader = dcp.FileSystemReader(checkpoint)
    stored = reader.read_metadata().state_dict_metadata
    wanted: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in stored.items()
        if isinstance(entry, TensorStorageMetadata) and _rounded(name, entry.size)
    }
    dcp.load(wanted, storage_reader=reader, no_dist=True)
    return {name.removeprefix(WEIGHTS): tensor.float() for name, tensor in wanted.items()}


def _rounded(name: str, size: torch.Size) -> bool:
    matrix = name.startswith(WEIGHTS) and len(size) > 1 and min(size[-2:]) > 1
    return matrix and not any(part in name for part in HIGH)


def _start(name: str, weight: torch.Tensor, seed: int, std: float) -> torch.Tensor:
    """Where a global tensor started, see `weights`; as BF16 had it."""
    position = torch.arange(weight.numel()).view(weight.shape)
    return (normal(name_key(seed, name), position) * std).bfloat16().float()


def _rounding(weight: torch.Tensor) -> torch.Tensor:
    each = weight.view(-1, *weight.shape[-2:])
    return torch.stack([dequantise(quantise(one, SQUARE, False)) - one for one in each])


__all__ = ["moved"]
