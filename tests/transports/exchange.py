"""Rows of tokens to the ranks that hold their experts, over any process group that torch has."""

from __future__ import annotations

import torch
import torch.distributed as dist


class Routes:
    """Which of this rank's T tokens go to which of R ranks, L experts each: a token once to each rank.

    What a rank receives, N rows, is in the order of the ranks that sent it and of their tokens.
    """

    def __init__(self, chosen_TE: torch.Tensor, group: dist.ProcessGroup) -> None:
        self.group, self.tokens = group, chosen_TE.shape[0]
        self._per_rank = chosen_TE.shape[1] // group.size()
        by_rank = chosen_TE.view(self.tokens, group.size(), self._per_rank)
        self._rows = [by_rank[:, rank].any(-1).nonzero().flatten() for rank in range(group.size())]
        self.sent = [len(rows) for rows in self._rows]
        counts = torch.empty(group.size(), dtype=torch.int64)
        dist.all_to_all_single(counts, torch.tensor(self.sent), group=group)
        self.received = counts.tolist()
        self.local_NL = self.slices(chosen_TE.to(torch.int32)).bool()

    def out(self, x_TW: torch.Tensor) -> torch.Tensor:
        """Rows of tokens to their ranks: [T, W] -> [N, W]."""
        return self._forth(torch.cat([x_TW[rows] for rows in self._rows]))

    def slices(self, x_TE: torch.Tensor) -> torch.Tensor:
        """To each rank what belongs to its own experts: [T, E] -> [N, L]."""
        parts = x_TE.split(self._per_rank, dim=1)
        return self._forth(torch.cat([part[rows] for part, rows in zip(parts, self._rows, strict=True)]))

    def back(self, y_NW: torch.Tensor) -> torch.Tensor:
        """Rows back to their tokens, and summed in FP32 as the libraries' kernels do: [N, W] -> [T, W]."""
        total = torch.zeros(self.tokens, y_NW.shape[1])
        for rows, part in zip(self._rows, self._home(y_NW), strict=True):
            total[rows] += part
        return total.to(y_NW.dtype)

    def slices_back(self, y_NL: torch.Tensor) -> torch.Tensor:
        """The way back of `slices`: [N, L] -> [T, E], 0 where nothing came from."""
        parts = []
        for rows, part in zip(self._rows, self._home(y_NL), strict=True):
            parts.append(torch.zeros(self.tokens, y_NL.shape[1], dtype=y_NL.dtype))
            parts[-1][rows] = part
        return torch.cat(parts, dim=1)

    def _forth(self, rows: torch.Tensor) -> torch.Tensor:
        found = rows.new_empty(sum(self.received), rows.shape[1])
        dist.all_to_all_single(found, rows, self.received, self.sent, group=self.group)
        return found

    def _home(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = rows.new_empty(sum(self.sent), rows.shape[1])
        dist.all_to_all_single(found, rows.contiguous(), self.sent, self.received, group=self.group)
        return found.split(self.sent)


class Sorted(Routes):
    """Routes whose received rows are copied for each expert and sorted by expert: P rows of N."""

    def __init__(self, chosen_TE: torch.Tensor, group: dist.ProcessGroup) -> None:
        super().__init__(chosen_TE, group)
        self._expert, self._row = self.local_NL.T.nonzero().unbind(1)
        self.counts = self.local_NL.sum(0)

    def dispatch(self, x_TW: torch.Tensor) -> torch.Tensor:
        """[T, W] -> [P, W]."""
        return self.out(x_TW)[self._row]

    def combine(self, y_PW: torch.Tensor) -> torch.Tensor:
        """[P, W] -> [T, W], sums."""
        total = torch.zeros(self.local_NL.shape[0], y_PW.shape[1])
        return self.back(total.index_add_(0, self._row, y_PW.float()).to(y_PW.dtype))

    def probs(self, probs_TE: torch.Tensor) -> torch.Tensor:
        """[T, E] -> [P]."""
        return self.slices(probs_TE)[self._row, self._expert]

    def probs_back(self, grad_P: torch.Tensor) -> torch.Tensor:
        """[P] -> [T, E]."""
        grad_NL = grad_P.new_zeros(self.local_NL.shape)
        grad_NL[self._row, self._expert] = grad_P
        return self.slices_back(grad_NL)


def dense(indices_TK: torch.Tensor, values_TK: torch.Tensor, experts: int) -> torch.Tensor:
    """Values of chosen experts as [T, E]; index -1 is nobody."""
    kept = indices_TK >= 0
    wide = values_TK.new_zeros(indices_TK.shape[0], experts)
    return wide.scatter_add(1, indices_TK.clamp(min=0), values_TK * kept)
