"""Fill-in-middle documents in bytes; `dsplugins.corpora.fim` says where they are cut."""

from __future__ import annotations

import numpy as np

from dsplugins.corpora.fim import cuts
from dsplugins.plugins.data.files import Document
from dsplugins.plugins.data.tokens import EOS, FIM_BEGIN, FIM_END, FIM_HOLE, Tokens, encode


def training_tokens(document: Document, *, seed: int, rate: float) -> Tokens:
    """Tokens of a document as trained on, with its <eos>; turned with probability `rate`.

    Every epoch holds the same tokens, and a resumed run sees what the first one saw.
    """
    text = encode(document.content)
    cut = cuts(document.name, len(text), seed=seed, rate=rate)
    if cut is None:
        return np.append(text, np.uint16(EOS))
    low, high = cut
    return psm(text[:low], text[low:high], text[high:])


def psm(prefix: Tokens, middle: Tokens, suffix: Tokens) -> Tokens:
    """The three parts as one document, `<eos>` included: 4 tokens longer than the parts."""
    begin, hole, end, eos = (np.array([mark], np.uint16) for mark in (FIM_BEGIN, FIM_HOLE, FIM_END, EOS))
    return np.concatenate([begin, prefix, hole, suffix, end, middle, eos])
