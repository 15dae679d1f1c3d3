"""What ranks do about data together: agree on it, and let the first one write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from dsplugins.contracts import EnvironmentUnfit


def same_on_every_rank(digest: str, differs: str) -> None:
    """Raise EnvironmentUnfit unless all ranks have this `digest`: their machines may hold different files.

    Collective where a process group is up. `differs` follows the ranks in the message.
    """
    digests = _gathered(digest)
    others = [rank for rank, other in enumerate(digests) if other != digests[0]]
    if others:
        raise EnvironmentUnfit(f"ranks {others} {differs}")


def seen_by_every_rank(folders: Sequence[Path], remedy: str) -> None:
    """Raise EnvironmentUnfit, on all ranks, where one doesn't see a folder that rank 0 wrote. Collective."""
    hidden = next((str(folder) for folder in folders if not folder.is_dir()), "")
    found = _gathered(hidden)
    blind = [rank for rank, missing in enumerate(found) if missing]
    if blind:
        raise EnvironmentUnfit(f"ranks {blind} don't see {found[blind[0]]}, which rank 0 wrote; {remedy}")


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


def _gathered[T](mine: T) -> list[T]:
    """Of all ranks, by rank."""
    if not _several():
        return [mine]
    all_ranks = [mine] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(all_ranks, mine)
    return all_ranks


def _several() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


__all__ = ["first_rank_does", "same_on_every_rank", "seen_by_every_rank"]
