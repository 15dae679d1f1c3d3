"""`PREFIX.json`: what stands beside a corpus and says how it was made. Same inputs, same sidecar."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dsplugins.corpora.tokenizer import TokenizerFile

FORMAT = 1


class SidecarFault(ValueError):
    """A file with a sidecar's name that is none, or one of another version."""


@dataclass(frozen=True)
class Sidecar:
    """What `dsplugins data build` knows of a corpus."""

    tokenizer: str
    """Where the `tokenizer.json` was, absolute; it may have moved since."""
    tokenizer_sha256: str
    vocab_size: int
    """Token ids are below this."""
    marks: Mapping[str, str]
    """`eos`, `fim_begin`, `fim_hole`, `fim_end` -> name in the tokenizer."""
    mark_ids: Mapping[str, int | None]
    fim_rate: float
    """Probability that a document is in fill-in-middle form."""
    seed: int
    """Of fill-in-middle."""
    documents: int
    fim_documents: int
    """Documents that are in fill-in-middle form."""
    tokens: int
    """Marks included."""
    bytes: int
    """Of all texts in UTF-8."""
    skipped: Mapping[str, int]
    """Reason -> lines and files that were left out."""
    key: str
    """Of the text in JSONL."""
    inputs: tuple[Mapping[str, Any], ...]
    """`path`, `files`, `bytes` of each."""
    files: Mapping[str, Mapping[str, Any]]
    """`bin`, `idx`, `bytes.npy` -> `bytes` and `sha256`."""
    versions: Mapping[str, str]
    format: int = field(default=FORMAT)

    def text(self) -> str:
        """As the file holds it."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    def tokenizer_file(self, prefix: Path, elsewhere: Path | None = None) -> TokenizerFile:
        """The tokenizer: `elsewhere`, or where it was, or as `tokenizer.json` beside the corpus.

        Raises FileNotFoundError where it is nowhere, ValueError where the file is another one.
        """
        places = [elsewhere] if elsewhere else [Path(self.tokenizer), prefix.parent / "tokenizer.json"]
        found = [place for place in places if place.is_file()]
        if not found:
            raise FileNotFoundError(f"its tokenizer is not at {' nor at '.join(map(str, places))}")
        files = [TokenizerFile(place, dict(self.marks)) for place in found]
        for file in files:
            if file.sha256 == self.tokenizer_sha256:
                return file
        raise ValueError(
            f"it was made with another tokenizer than {found[0]}: SHA-256 {self.tokenizer_sha256[:12]}..., "
            f"not {files[0].sha256[:12]}..."
        )


def place(prefix: Path) -> Path:
    """Of the sidecar of a corpus."""
    return prefix.with_name(prefix.name + ".json")


def read(prefix: Path) -> Sidecar | None:
    """The sidecar of a corpus; None where there is none. Raises SidecarFault for what can't be understood."""
    file = place(prefix)
    try:
        raw = json.loads(file.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise SidecarFault(f"{file} is not JSON: {error}") from None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise SidecarFault(f"{file} is not a sidecar of format {FORMAT}")
    try:
        return Sidecar(**{**raw, "inputs": tuple(raw["inputs"])})
    except (TypeError, KeyError) as error:
        raise SidecarFault(f"{file} is not a sidecar of format {FORMAT}: {error}") from None


__all__ = ["Sidecar", "SidecarFault", "place", "read"]
