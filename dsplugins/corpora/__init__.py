"""Corpora on disk: from text to megatron-core's `.bin`/`.idx` with a sidecar, and what data plugins share.

`build` makes one: `sources` finds the documents, `tasks` turns pieces of files into tokens in several
processes (`pool`), and core's own builder writes them in order. `sidecar` says what was done, `summary`
what is in it. `draws` and `fim` belong to every data plugin.
"""
