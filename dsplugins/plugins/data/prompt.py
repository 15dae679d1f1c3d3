"""A held-out line for the model to finish."""

from __future__ import annotations

import re
from collections.abc import Iterable

from dsplugins.plugins.data.files import Document

# A method's head: short, and its beginning says enough for a small model to try.
METHOD = re.compile(rb"\n *def [a-z]\w+(?=\(self[^\n]*:\n)")
# Any line with at least eight bytes on both sides of a word's end.
LINE = re.compile(rb"\n *[^\s#][^\n]{7,40}\b(?=[^\n]{8,})")


def held_out_line(documents: Iterable[Document], context: int) -> tuple[bytes, str] | None:
    """At most `context` bytes that end inside a line, and the rest of that line; None if there is none.

    The prompt begins at the start of a line where a line starts in its first half.
    """
    documents = tuple(documents)
    for pattern in (METHOD, LINE):
        for document in documents:
            for match in pattern.finditer(document.content, context // 2):
                return _cut(document.content, match.end(), context)
    return None


def _cut(content: bytes, end: int, context: int) -> tuple[bytes, str]:
    start = max(0, end - context)
    if start > 0:
        newline = content.find(b"\n", start, start + context // 2)
        start = start if newline < 0 else newline + 1
    line_end = content.find(b"\n", end)
    rest = content[end:] if line_end < 0 else content[end:line_end]
    return content[start:end], rest.decode("utf-8", errors="replace")
