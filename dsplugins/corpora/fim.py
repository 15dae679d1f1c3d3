"""Where a fill-in-middle document is cut, and the order of its parts (DeepSeek-V3, section 4.1).

    <fim_begin> prefix <fim_hole> suffix <fim_end> middle <eos>

Applied to whole documents before packing, to a tenth of them in V3. Whether a document is turned and
where it is cut belongs to (seed, name) alone: neither its place in the corpus nor the epoch matters.
"""

from __future__ import annotations

from dsplugins.corpora.draws import draws


def cuts(name: str, length: int, *, seed: int, rate: float) -> tuple[int, int] | None:
    """Where the middle of a document of `length` characters begins and ends; None if it is left as it is.

    A document is turned with probability `rate`. Both cuts are uniform over the `length` + 1 gaps (character
    level, arXiv 2207.14255); any part may be empty.
    """
    turned, first, second, _ = draws("fim", seed, name)
    if turned >= rate:
        return None
    low, high = sorted(int(cut * (length + 1)) for cut in (first, second))
    return low, high
