"""A `tokenizer.json` as a corpus needs it: text to ids and back, and four marks that no text can produce."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dsplugins.contracts import EnvironmentUnfit

if TYPE_CHECKING:
    from tokenizers import Tokenizer

V3_MARKS = {
    "eos": "<｜end▁of▁sentence｜>",
    "fim_begin": "<｜fim▁begin｜>",
    "fim_hole": "<｜fim▁hole｜>",
    "fim_end": "<｜fim▁end｜>",
}
"""What the marks are called in DeepSeek-V3's tokenizer."""
TOGETHER = 1 << 16
"""Characters that the library encodes in a call: what it makes of them is a hundred times as large."""


@dataclass(frozen=True)
class TokenizerFile:
    """A tokenizer with the names of its marks. Pickled as path and names: a process reads the file once."""

    path: Path
    marks: Mapping[str, str]
    """`eos`, and for fill-in-middle `fim_begin`, `fim_hole`, `fim_end` -> name in the tokenizer."""

    @cached_property
    def sha256(self) -> str:
        """Of the file."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

    @cached_property
    def vocab_size(self) -> int:
        """All ids are below this."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def ids(self) -> dict[str, int | None]:
        """Mark -> its id, None where the tokenizer has no such token."""
        return {mark: self._tokenizer.token_to_id(name) for mark, name in self.marks.items()}

    @cached_property
    def unknown(self) -> int | None:
        """Id of the token that stands for what the tokenizer doesn't know; None where there is none."""
        model = json.loads(self.path.read_text(encoding="utf-8"))["model"]
        named, number = model.get("unk_token"), model.get("unk_id")
        return number if named is None else self._tokenizer.token_to_id(named)

    def encode(self, texts: Iterable[str]) -> Iterator[NDArray[np.uint32]]:
        """Ids of each text. A mark's name in a text is text: its id never comes out."""
        pieces = [list(self._without_marks(text)) for text in texts]
        encoded = (ids for call in _calls(chain.from_iterable(pieces)) for ids in self._ids(call))
        for text in pieces:
            yield np.concatenate([next(encoded) for _ in text])

    def _ids(self, call: list[str]) -> list[NDArray[np.uint32]]:
        found = self._tokenizer.encode_batch_fast(call, add_special_tokens=False)
        return [np.array(one.ids, dtype=np.uint32) for one in found]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, marks by their names; an id that the tokenizer doesn't have is nothing."""
        known = [int(token) for token in ids if 0 <= token < self.vocab_size]
        return str(self._tokenizer.decode(known, skip_special_tokens=False))

    def _without_marks(self, text: str) -> Iterator[str]:
        """`text` in pieces that don't hold a whole mark: one is cut behind its first character."""
        start = 0
        while found := [at for name in self.marks.values() if (at := text.find(name, start)) >= 0]:
            yield text[start : min(found) + 1]
            start = min(found) + 1
        yield text[start:]

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        tokenizer = load(self.path)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = True  # other special tokens in a text are text, too
        return tokenizer

    def __reduce__(self) -> tuple[Any, ...]:
        return _opened, (self.path, tuple(self.marks.items()))


def _calls(pieces: Iterable[str]) -> Iterator[list[str]]:
    """In order, few enough for a call, or a long one alone."""
    call: list[str] = []
    held = 0
    for piece in pieces:
        if call and held + len(piece) > TOGETHER:
            yield call
            call, held = [], 0
        call.append(piece)
        held += len(piece)
    if call:
        yield call


@cache
def _opened(path: Path, marks: tuple[tuple[str, str], ...]) -> TokenizerFile:
    return TokenizerFile(path, dict(marks))


def load(path: Path) -> Tokenizer:
    """The tokenizer in a file. Raises EnvironmentUnfit without the library, ValueError for another file."""
    if importlib.util.find_spec("tokenizers") is None:
        raise EnvironmentUnfit("tokenizers is not installed: pip install 'dsplugins[data]'")
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"{path} is not a tokenizer.json: {error}") from error


__all__ = ["V3_MARKS", "TokenizerFile", "load"]
