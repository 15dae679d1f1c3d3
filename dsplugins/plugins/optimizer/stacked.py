"""Stacked weights, tensor by tensor, so that a norm doesn't depend on how experts are held.

FP32 sums depend on where they are cut. `sequential` has a gradient for each expert's matrix, `grouped` one
for all of a layer's: their norms would differ in the eighth digit, and with clipping all that comes after.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from dsplugins.optimizer_groups import Placement, leaves, placements


@dataclass(frozen=True)
class Stacked:
    """The stacked weights of one optimizer: those whose parameter has a true `stacked`.

    None where data parallelism with ZeRO cuts one of them: there the ranks' shares of experts that are held
    apart are others, too, and no order of sums is the same.
    """

    mains: Mapping[torch.Tensor, tuple[str, int]]
    """What the optimizer updates -> (name of the module, number of tensors in the stack)."""
    backwards: bool
    """True where the optimizer lists parameters last to first, as the distributed one does."""

    @classmethod
    def of(cls, part: MegatronOptimizer, chunks: Sequence[torch.nn.Module]) -> Stacked:
        """Those of `part`, which optimizes parameters of `chunks`."""
        found = [place for place in placements(part, chunks) if getattr(place.parameter, "stacked", False)]
        mains = {place.main: (place.name.rpartition(".")[0], len(place.parameter)) for place in found}
        backwards = any(isinstance(leaf, DistributedOptimizer) for leaf in leaves(part))
        return cls(mains if all(map(_whole, found)) else {}, backwards)

    def apart(self, grads: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """`grads` with each stack taken apart, in the order of a model that holds its tensors apart.

        That order goes through a module expert by expert, and through the matrices of each.
        """
        owners = {id(main.grad): key for main, key in self.mains.items()}
        found: list[torch.Tensor] = []
        for key, members in groupby(grads, lambda grad: owners.get(id(grad))):
            if key is None:
                found.extend(members)
                continue
            stacks = [list(grad.view(key[1], -1)) for grad in members]
            experts = list(zip(*stacks, strict=True))
            found.extend(chain.from_iterable(reversed(experts) if self.backwards else experts))
        return found


def _whole(place: Placement) -> bool:
    return place.main.numel() == place.parameter.numel()


__all__ = ["Stacked"]
