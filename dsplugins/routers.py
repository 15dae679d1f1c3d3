"""The routers of a rank's chunks: their names, and their counts of one step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core import parallel_state

from dsplugins.model import bare, moe_pattern


def names(config: Any) -> tuple[str, ...]:
    """All L routers of the model, decoder first (layers count from 0), MTP last."""
    decoder = [f"decoder.{i}" for i, moe in enumerate(moe_pattern(config)) if moe]
    if not decoder:
        return ()
    mtp_moe = moe_pattern(config)[-1]
    depths = config.mtp_num_layers or 0
    return (*decoder, *(f"mtp.{i}" for i in range(depths) if mtp_moe))


def local(chunks: Sequence[torch.nn.Module]) -> Iterator[tuple[str, Any]]:
    """(name, router) of the routers that this rank holds."""
    for chunk in map(bare, chunks):
        for layer in chunk.decoder.layers:
            if hasattr(layer.mlp, "router"):
                yield f"decoder.{layer.layer_number - 1}", layer.mlp.router
        mtp = getattr(chunk, "mtp", None)
        for depth, layer in enumerate(mtp.layers if mtp is not None else ()):
            if hasattr(layer.mtp_model_layer.mlp, "router"):
                yield f"mtp.{depth}", layer.mtp_model_layer.mlp.router


class Balance:
    """Sums the step's counts over the ranks that share a router, and lets routers move their biases."""

    def __init__(self, config: Any, chunks: Sequence[torch.nn.Module]) -> None:
        self.names = names(config)
        self.experts = config.num_moe_experts or 0
        self.routers = list(local(chunks))
        unknown = {name for name, _ in self.routers} - set(self.names)
        assert not unknown, f"routers {unknown} stand where the configuration has none"
        device = next(chunks[0].parameters()).device
        self.counts = torch.zeros(len(self.names), self.experts, dtype=torch.float64, device=device)
        """[L, E], this step's, of this rank's layers only; summed over TP x CP x DP."""
        self.aux = torch.zeros((), dtype=torch.float64, device=device)

    def __str__(self) -> str:
        """What is done each step, of what this rank sees; nothing without experts."""
        moves = any(hasattr(router, "update_bias") for _, router in self.routers)
        return ("router counts and bias update" if moves else "router counts") if self.names else ""

    @torch.no_grad()
    def __call__(self, move: bool = True) -> None:
        """Once a step, after gradients are final; biases stay where they are unless `move`."""
        self.counts.zero_()
        self.aux.zero_()
        if not self.routers:
            return
        group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
        summed = torch.stack([_mine(router) for _, router in self.routers])
        if group.size() > 1:
            torch.distributed.all_reduce(summed, group=group)
        self.aux += summed[:, -1].double().sum()
        for (name, router), counts in zip(self.routers, summed[:, :-1], strict=True):
            self.counts[self.names.index(name)] = counts.double()
            if move and hasattr(router, "update_bias"):
                router.update_bias(counts)
            router.local_tokens_per_expert.zero_()
            if hasattr(router, "aux_loss_sum"):
                router.aux_loss_sum.zero_()


def _mine(router: torch.nn.Module) -> torch.Tensor:
    """Counts [E] and, behind them, the balance loss of this rank."""
    counts: Any = router.local_tokens_per_expert
    aux = getattr(router, "aux_loss_sum", None)
    return torch.cat([counts, (aux if aux is not None else counts.new_zeros(())).view(1)])


def max_vio(counts: torch.Tensor) -> float:
    """Mean over layers of (max load - mean load) / mean load; counts [L, E] (arXiv 2408.15664)."""
    mean = counts.double().mean(dim=1)
    return float(((counts.double().amax(dim=1) - mean) / mean.clamp(min=1e-9)).mean())
