"""What ranks do about data together: agree on it, and let the first one write."""

from __future__ import annotations

from collections.abc import Callable

import torch

from dsplugins.contracts import EnvironmentUnfit


def same_on_every_rank(digest: str, differs: str) -> None:
    """Raise EnvironmentUnfit unless all ranks have this `digest`: their machines may hold different files.

    Collective where a process group is up; nothing to compare otherwise. `differs` follows the ranks.
    """
    if not _several():
        return
    digests: list[str] = [""] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(digests, digest)
    others = [rank for rank, other in enumerate(digests) if other != digests[0]]
    if others:
        raise EnvironmentUnfit(f"ranks {others} {differs}")


def first_rank_does(work: Callable[[], None]) -> None:
    """Call `work` on rank 0 while the others wait. Collective: where it fails, all ranks do.

    Raises EnvironmentUnfit for an OSError.
    """
    failure: Exception | None = None
    if not _several() or torch.distributed.get_rank() == 0:
        try:
            work()
        except OSError as error:
            failure = EnvironmentUnfit(f"{error.filename} can't be written: {error.strerror}")
        except Exception as error:
            failure = error
    said = [(type(failure) is EnvironmentUnfit, str(failure)) if failure else None]
    if _several():
        torch.distributed.broadcast_object_list(said, src=0)
    if failure:
        raise failure
    if said[0]:
        unfit, text = said[0]
        raise EnvironmentUnfit(text) if unfit else RuntimeError(f"rank 0 failed: {text}")


def _several() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


__all__ = ["first_rank_does", "same_on_every_rank"]
