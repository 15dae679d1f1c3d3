"""A corpus on disk, as megatron-core reads it, with what its sidecar knows."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dsplugins.contracts import EnvironmentUnfit
from dsplugins.corpora import sidecar
from dsplugins.corpora.reading import AGAIN, opened
from dsplugins.corpora.sidecar import Sidecar, SidecarFault
from dsplugins.corpora.tokenizer import V3_MARKS, TokenizerFile

if TYPE_CHECKING:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

ENDS = 1 << 20
"""Bytes at both ends of a file that stand for it where no sidecar has its digest."""


class Mismatch(ValueError):
    """A corpus is not what the recipe says that it is."""


@dataclass(frozen=True)
class Corpus:
    """One prefix."""

    prefix: Path
    sidecar: Sidecar | None
    tokenizer: TokenizerFile

    @classmethod
    def open(cls, prefix: Path, tokenizer: Path | None) -> Corpus:
        """Raises EnvironmentUnfit for what is missing or broken here, Mismatch for another tokenizer."""
        if missing := absent(prefix):
            raise EnvironmentUnfit(missing)
        try:
            described = sidecar.read(prefix)
        except SidecarFault as error:
            raise EnvironmentUnfit(str(error)) from error
        _whole(prefix, described.files if described else {})
        corpus = cls(prefix, described, _tokenizer(prefix, described, tokenizer))
        assert len(corpus.files)  # reads the index
        return corpus

    @cached_property
    def files(self) -> IndexedDataset:
        """megatron-core's own. Raises EnvironmentUnfit for files of another format."""
        return opened(self.prefix)

    @cached_property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        return self.sidecar.vocab_size if self.sidecar else self.tokenizer.vocab_size

    @cached_property
    def digest(self) -> str:
        """Equal digests, equal corpora."""
        total = hashlib.sha256()
        if self.sidecar:
            total.update(self.sidecar.text().encode())
            return total.hexdigest()
        for end in (".bin", ".idx"):
            with _with(self.prefix, end).open("rb") as stream:
                size = stream.seek(0, 2)
                for place in (0, max(0, size - ENDS)):
                    stream.seek(place)
                    total.update(b"%d" % size + stream.read(ENDS))
        return total.hexdigest()

    @cached_property
    def bytes(self) -> NDArray[np.int64] | None:
        """Of each document's text, int64 [documents]; None where nobody counted them."""
        file = _with(self.prefix, ".bytes.npy")
        return np.load(file, mmap_mode="r") if self.sidecar and file.is_file() else None

    def document(self, index: int) -> NDArray[Any]:
        """Tokens of a document. Raises EnvironmentUnfit for one that the corpus can't have."""
        tokens = self.files[index]
        if len(tokens):
            self.refuse_strangers(int(tokens.min()), int(tokens.max()))
        return tokens

    def refuse_strangers(self, lowest: int, highest: int) -> None:
        """Raise EnvironmentUnfit where tokens from `lowest` to `highest` are not all in the vocabulary."""
        if lowest < 0 or highest >= self.vocab_size:
            raise EnvironmentUnfit(
                f"{self.prefix}.bin holds token {highest if lowest >= 0 else lowest}, and its tokenizer has "
                f"{self.vocab_size} of them: it is damaged, as `dsplugins data show {self.prefix} --verify` "
                f"tells, or of another tokenizer; {AGAIN}"
            )

    def turned(self, tokens: NDArray[Any]) -> bool:
        """Whether a document is in fill-in-middle form."""
        return bool(len(tokens)) and int(tokens[0]) == self.tokenizer.ids["fim_begin"]


def absent(prefix: Path) -> str | None:
    """What of a corpus is not there, in words; None where its two files are."""
    files = [_with(prefix, end) for end in (".bin", ".idx")]
    return next((f"{file} is not there" for file in files if not file.is_file()), None)


def _with(prefix: Path, end: str) -> Path:
    return prefix.with_name(prefix.name + end)


def _whole(prefix: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    for end, file in files.items():
        path = _with(prefix, f".{end}")
        size = path.stat().st_size if path.is_file() else None
        if size != file["bytes"]:
            said = "is not there" if size is None else f"has {size:,} bytes"
            raise EnvironmentUnfit(f"{path} {said}, and {file['bytes']:,} by its sidecar: copy it again")


def _tokenizer(prefix: Path, described: Sidecar | None, elsewhere: Path | None) -> TokenizerFile:
    try:
        if described:
            file = described.tokenizer_file(prefix, elsewhere)
        elif elsewhere is None:
            raise Mismatch(f"{prefix} has no sidecar {sidecar.place(prefix).name} that names its tokenizer")
        elif not elsewhere.is_file():
            raise EnvironmentUnfit(f"{elsewhere} is not there")
        else:
            file = TokenizerFile(elsewhere, V3_MARKS)
        assert file.vocab_size > 0  # reads it
        return file
    except FileNotFoundError as error:
        raise EnvironmentUnfit(f"{prefix}: {error}") from error
    except Mismatch:
        raise
    except ValueError as error:
        raise Mismatch(f"{prefix}: {error}") from error


__all__ = ["Corpus", "Mismatch", "absent"]
