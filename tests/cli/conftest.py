"""A small tokenizer, and corpora made with it."""

from small_bpe import bpe, core, corpus  # noqa: F401
