"""Bytes as tokens: 0..255 are bytes, then the marks that no text can contain."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

EOS = 256
"""Ends every document."""
FIM_BEGIN, FIM_HOLE, FIM_END = 257, 258, 259
"""Marks of fill-in-middle documents; see `fim`."""
SPECIALS = {EOS: "<eos>", FIM_BEGIN: "<fim_begin>", FIM_HOLE: "<fim_hole>", FIM_END: "<fim_end>"}
VOCAB_SIZE = 260
"""256 bytes and 4 marks. There is no <bos>: V3's packed documents are divided by their ends alone."""

Tokens = NDArray[np.uint16]


def encode(content: bytes) -> Tokens:
    """One token a byte, uint16 [len(content)]; no mark is added."""
    return np.frombuffer(content, dtype=np.uint8).astype(np.uint16)


def decode(tokens: Iterable[int]) -> str:
    """Text of `tokens`. Broken UTF-8 becomes U+FFFD; marks, and ids that mean nothing, are shown in <>."""
    pieces = []
    for is_text, run in groupby(map(int, tokens), key=lambda token: 0 <= token < 256):
        if is_text:
            pieces.append(bytes(run).decode("utf-8", errors="replace"))
        else:
            pieces += [SPECIALS.get(token, f"<{token}>") for token in run]
    return "".join(pieces)


def joined(pieces: Sequence[Tokens]) -> Tokens:
    """One array of all pieces; also of none."""
    return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.uint16)
