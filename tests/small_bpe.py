"""A small byte-level BPE with DeepSeek-V3's names for its marks, trained on the standard library."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path

import pytest

from dsplugins.corpora.build import Wanted, build
from dsplugins.corpora.tokenizer import V3_MARKS, TokenizerFile
from dsplugins.testing import prepare_cpu

WRITTEN = Path(sysconfig.get_path("stdlib")) / "json"


def train(path: Path, vocab_size: int = 512) -> TokenizerFile:
    """Write a `tokenizer.json`: 256 bytes, merges learned from Python's `json` package, four marks."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(V3_MARKS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(file) for file in sorted(WRITTEN.glob("*.py"))], trainer)
    # As in V3's file: the end of a sentence is special, the marks of fill-in-middle are plain added tokens.
    special = {"eos"}
    tokenizer.add_tokens([AddedToken(V3_MARKS[m], normalized=False) for m in V3_MARKS if m not in special])
    tokenizer.add_special_tokens([V3_MARKS[m] for m in special])
    tokenizer.save(str(path))
    return TokenizerFile(path, V3_MARKS)


@pytest.fixture(scope="session")
def bpe(tmp_path_factory):
    """The tokenizer, 512 ids; its file is one that a reader of V3's would recognise."""
    return train(tmp_path_factory.mktemp("bpe") / "tokenizer.json")


@pytest.fixture(scope="session")
def core():
    """megatron-core can be imported into this process."""
    prepare_cpu()


@pytest.fixture
def corpus(bpe, tmp_path, core):
    """`corpus(name, texts, **wanted)`: a corpus of JSON lines under `tmp_path`; gives its prefix."""

    def make(name, texts, tokenizer=bpe, **wanted):
        source = tmp_path / f"{name}.jsonl"
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        prefix = tmp_path / name
        build(Wanted((source,), tokenizer, prefix, **wanted), 1, print, lambda progress: None, print)
        return prefix

    return make
