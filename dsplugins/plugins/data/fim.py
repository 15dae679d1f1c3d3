"""Fill-in-middle documents, in the prefix-suffix-middle form of DeepSeek-V3 (section 4.1).

    <fim_begin> prefix <fim_hole> suffix <fim_end> middle <eos>

Applied to whole documents before packing, to a tenth of them in V3. Whether a document is turned
and where it is cut belongs to (seed, name) alone: neither its place in the stream nor the epoch
matters, so every epoch holds the same tokens and a resumed run sees what the first one saw.
"""

from __future__ import annotations

import numpy as np

from dsplugins.plugins.data.draws import draws
from dsplugins.plugins.data.files import Document
from dsplugins.plugins.data.tokens import EOS, FIM_BEGIN, FIM_END, FIM_HOLE, Tokens, encode


def training_tokens(document: Document, *, seed: int, rate: float) -> Tokens:
    """Tokens of a document as trained on, with its <eos>; turned with probability `rate`."""
    turned, first, second, _ = draws("fim", seed, document.name)
    text = encode(document.content)
    if turned >= rate:
        return np.append(text, np.uint16(EOS))
    # Both cuts are uniform over the len + 1 gaps (character level, arXiv 2207.14255); any part may be empty.
    low, high = sorted(int(cut * (len(text) + 1)) for cut in (first, second))
    return psm(text[:low], text[low:high], text[high:])


def psm(prefix: Tokens, middle: Tokens, suffix: Tokens) -> Tokens:
    """The three parts as one document, `<eos>` included: 4 tokens longer than the parts."""
    begin, hole, end, eos = (np.array([mark], np.uint16) for mark in (FIM_BEGIN, FIM_HOLE, FIM_END, EOS))
    return np.concatenate([begin, prefix, hole, suffix, end, middle, eos])
