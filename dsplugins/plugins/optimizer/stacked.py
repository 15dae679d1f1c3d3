"""Stacked weights, tensor by tensor, so that a norm doesn't depend on how experts are held.

FP32 sums depend on where they are cut. `sequential` has a gradient for each expert's matrix, `grouped` one
for all of a layer's: their norms would differ in the eighth digit, and with clipping all that comes after.
Where ZeRO cuts them among ranks, `gradient_buffers` sees to it that either kind is cut at the same elements.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from dsplugins.optimizer_groups import Placement, leaves, placements


@dataclass(frozen=True)
class Stacked:
    """The stacked weights of one optimizer: those whose parameter has a true `stacked`."""

    places: Mapping[torch.Tensor, Placement]
    """What the optimizer updates -> which share of which stack it is."""
    backwards: bool
    """True where the optimizer lists parameters last to first, as the distributed one does."""

    @classmethod
    def of(cls, part: MegatronOptimizer, chunks: Sequence[torch.nn.Module]) -> Stacked:
        """Those of `part`, which optimizes parameters of `chunks`."""
        found = [place for place in placements(part, chunks) if getattr(place.parameter, "stacked", False)]
        backwards = any(isinstance(leaf, DistributedOptimizer) for leaf in leaves(part))
        return cls({place.main: place for place in found}, backwards)

    def apart(self, grads: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """`grads` with each stack taken apart, in the order of a model that holds its tensors apart.

        That order goes through a module expert by expert, and through the matrices of each.
        """
        owners = {id(main.grad): place for main, place in self.places.items()}
        found: list[torch.Tensor] = []
        for module, members in groupby(grads, lambda grad: _module(owners.get(id(grad)))):
            if module is None:
                found.extend(members)
                continue
            pieces = [piece for grad in members for piece in _pieces(grad, owners[id(grad)])]
            pieces.sort(key=lambda piece: piece[0], reverse=self.backwards)  # stable: matrices stay in turn
            found.extend(piece for _, piece in pieces)
        return found


def _module(place: Placement | None) -> str | None:
    return None if place is None else place.name.rpartition(".")[0]


def _pieces(grad: torch.Tensor, place: Placement) -> list[tuple[int, torch.Tensor]]:
    """(expert, what of its gradient is here), of a share of a stack; flat."""
    size = place.parameter.numel() // len(place.parameter)
    experts = range(place.start // size, -(-place.stop // size))
    cuts = [max(place.start, expert * size) for expert in experts] + [place.stop]
    sizes = [stop - start for start, stop in pairwise(cuts)]
    return list(zip(experts, grad.view(-1).split(sizes), strict=True))


__all__ = ["Stacked"]
