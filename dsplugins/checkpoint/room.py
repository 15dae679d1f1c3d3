"""Whether a checkpoint that could not be written had no room: torch's writer doesn't say."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from dsplugins.checkpoint.pieces import Piece


def lacking(partial: Path, rank: int, held: Sequence[Piece]) -> str:
    """Why this rank's share has no room; empty where it has, or nothing of it is left to be written.

    What is still to be written is asked for, and given back, in the folder where it was being written; macOS
    has no call for that.
    """
    if sys.platform == "darwin":
        return ""
    written = sum(file.stat().st_size for file in partial.glob(f"__{rank}_*"))
    left = sum(piece.data.nbytes for piece in held if piece.main) - written
    if left <= 0:
        return ""
    probe = partial / f"room.{rank}"
    try:
        with probe.open("wb") as stream:
            os.posix_fallocate(stream.fileno(), 0, left)
    except OSError as error:
        return f"rank {rank}: {error.strerror} for {left} bytes of {left + written}"
    finally:
        probe.unlink(missing_ok=True)
    return ""


__all__ = ["lacking"]
