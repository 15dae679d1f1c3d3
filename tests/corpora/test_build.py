"""Corpora against the tokenizer and megatron-core's own reader: whole, the same for any number of workers."""

import hashlib
import json
import os
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from dsplugins.corpora import sidecar
from dsplugins.corpora.build import BuildRefused, Wanted, build
from dsplugins.corpora.reading import opened
from dsplugins.corpora.sources import PIECE
from dsplugins.corpora.tokenizer import V3_MARKS, TokenizerFile

FOLDERS = tuple(
    Path(sysconfig.get_path("stdlib")) / name for name in ("email", "asyncio", "unittest", "ctypes")
)
BAD = '{"text": "good"}\nnot json\n{"text": ""}\n{"text": "better"}\n'


def documents(prefix):
    """As megatron-core reads them."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    read = IndexedDataset(str(prefix))
    assert read.document_indices.tolist() == list(range(len(read) + 1)), "a document is one sequence"
    return [read[i].tolist() for i in range(len(read))]


def restored(tokens, bpe):
    """Text of a document by its marks, independent of how they were put in."""
    ids = bpe.ids
    assert tokens[-1] == ids["eos"]
    if tokens[0] != ids["fim_begin"]:
        return bpe.decode(tokens[:-1])
    hole, end = tokens.index(ids["fim_hole"]), tokens.index(ids["fim_end"])
    prefix, suffix, middle = tokens[1:hole], tokens[hole + 1 : end], tokens[end + 1 : -1]
    return "".join(bpe.decode(part) for part in (prefix, middle, suffix))


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def nothing(*_):
    pass


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_documents_come_back(corpus, bpe, rate):
    texts = ["def f(self):\n    return 1\n", "ä 四 😀", f"a {V3_MARKS['fim_hole']} b", "x"]
    prefix = corpus("c", texts, fim_rate=rate)
    found = documents(prefix)
    assert [restored(tokens, bpe) for tokens in found] == texts
    assert [tokens[0] == bpe.ids["fim_begin"] for tokens in found] == [rate == 1.0] * 4
    assert np.load(f"{prefix}.bytes.npy").tolist() == [len(text.encode()) for text in texts]


def test_fill_in_middle_is_cut_where_the_quick_start_cuts(corpus, bpe):
    from dsplugins.plugins.data.files import Document
    from dsplugins.plugins.data.fim import training_tokens

    # In ASCII a character is a byte, so both name the same places.
    texts = [f"document number {i} has some words in it" for i in range(60)]
    prefix = corpus("c", texts, fim_rate=0.5, seed=7)
    for line, (text, tokens) in enumerate(zip(texts, documents(prefix), strict=True), 1):
        theirs = training_tokens(Document(f"c.jsonl:{line}", text.encode()), seed=7, rate=0.5).tolist()
        marks = {256: "eos", 257: "fim_begin", 258: "fim_hole", 259: "fim_end"}
        spelled = "".join(V3_MARKS[marks[t]] if t in marks else chr(t) for t in theirs)
        assert bpe.decode(tokens) == spelled


def test_only_seed_and_name_decide_on_fill_in_middle(corpus, bpe):
    texts = [f"text {i} " * 9 for i in range(40)]
    one = documents(corpus("c", texts, fim_rate=0.3))
    assert documents(corpus("c", texts, fim_rate=0.3, overwrite=True)) == one
    assert documents(corpus("c", texts, fim_rate=0.3, seed=5, overwrite=True)) != one
    assert documents(corpus("other", texts, fim_rate=0.3)) != one
    half = documents(corpus("c", texts[:20], fim_rate=0.3, overwrite=True))
    assert half == one[:20], "what comes later changes nothing"


def test_workers_change_nothing(bpe, tmp_path, core):
    made, told = [], []
    for workers in (1, 3):
        out, bad = tmp_path / str(workers), []
        wanted = Wanted(FOLDERS, bpe, out / "c", ("*.py",), seed=3, skip_bad=True)
        build(wanted, workers, bad.append, nothing, nothing)
        made.append(files(out))
        told.append(bad)
    assert made[0] == made[1] and told[0] == told[1]
    assert made[0].keys() == {"c.bin", "c.idx", "c.bytes.npy", "c.json"}
    paths = [path for folder in FOLDERS for path in sorted(folder.rglob("*.py"), key=Path.as_posix)]
    contents = [path.read_bytes() for path in paths]
    assert sum(map(len, contents)) > PIECE, "more than one task"
    assert [bad.path for bad in told[0]] == [
        str(p) for p, content in zip(paths, contents, strict=True) if not content
    ]
    assert [restored(t, bpe).encode() for t in documents(out / "c")] == list(filter(None, contents))


def test_the_sidecar_says_what_was_done(corpus, bpe):
    texts = [f"text {i} " * 9 for i in range(40)]
    prefix = corpus("c", texts, fim_rate=0.25, seed=11)
    made, found = sidecar.read(prefix), documents(prefix)
    assert made.documents == 40 and made.tokens == sum(map(len, found))
    assert made.fim_documents == sum(tokens[0] == bpe.ids["fim_begin"] for tokens in found) > 0
    assert made.bytes == sum(len(text) for text in texts)
    assert (made.fim_rate, made.seed, made.vocab_size, made.skipped) == (0.25, 11, 512, {})
    assert made.tokenizer_sha256 == hashlib.sha256(bpe.path.read_bytes()).hexdigest()
    assert made.mark_ids == bpe.ids and made.inputs[0]["files"] == 1
    for part, file in made.files.items():
        content = Path(f"{prefix}.{part}").read_bytes()
        assert file == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_bad_lines_fail_at_the_end_and_leave_nothing(bpe, tmp_path, core):
    source = tmp_path / "in.jsonl"
    source.write_text(BAD)
    told, out = [], tmp_path / "out"
    with pytest.raises(BuildRefused, match=r"2 of the inputs' .*1 x empty text, 1 x not JSON.*--skip-bad"):
        build(Wanted((source,), bpe, out / "c"), 1, told.append, nothing, nothing)
    assert [str(bad).partition(" (")[0] for bad in told] == [
        f"{source}:2: not JSON",
        f"{source}:3: empty text",
    ]
    assert list(out.iterdir()) == []
    made = build(Wanted((source,), bpe, out / "c", skip_bad=True), 1, nothing, nothing, nothing)
    assert made.documents == 2 and made.skipped == {"empty text": 1, "not JSON": 1}


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_build_leaves_what_was_there(corpus, bpe, error):
    prefix = corpus("c", ["one", "two"])
    before = files(prefix.parent)

    def interrupt(progress):
        raise error

    with pytest.raises((KeyboardInterrupt, OSError)):
        build(
            Wanted((prefix.parent / "c.jsonl",), bpe, prefix, overwrite=True), 1, nothing, interrupt, nothing
        )
    assert files(prefix.parent) == before


@pytest.mark.parametrize("steps", range(4))
def test_a_kill_while_files_are_put_in_place_leaves_nothing_that_opens(corpus, monkeypatch, steps):
    """Old and new files never stand together as one corpus."""
    prefix = corpus("c", ["one", "two"], fim_rate=0.0)
    put, left = os.replace, iter(range(steps))

    def cut_off(*names):
        if next(left, None) is None:
            raise KeyboardInterrupt
        put(*names)

    monkeypatch.setattr(os, "replace", cut_off)
    with pytest.raises(KeyboardInterrupt):
        corpus("c", ["other text", "and", "more"], fim_rate=0.0, overwrite=True)
    assert sidecar.read(prefix) is None and not list(prefix.parent.glob("*.partial"))
    if prefix.with_name("c.idx").exists():
        assert steps == 3 and len(opened(prefix)) == 3  # all but the sidecar is there: the new corpus, whole


def test_what_is_there_is_replaced_only_when_asked(corpus, bpe):
    prefix = corpus("c", ["one"])
    with pytest.raises(BuildRefused, match=r"c\.bin is there already.*--overwrite"):
        corpus("c", ["two"])
    corpus("c", ["two"], overwrite=True)
    assert bpe.decode(documents(prefix)[0][:-1]) == "two"
    own = prefix.with_name("notes.json")
    own.write_text('{"not": "a sidecar"}')
    with pytest.raises(BuildRefused, match=r"notes\.json is not a sidecar.*choose another --out"):
        corpus("notes", ["three"], overwrite=True)
    assert own.read_text() == '{"not": "a sidecar"}'


def test_a_tokenizer_without_the_marks_is_refused(corpus, bpe):
    other = TokenizerFile(bpe.path, {**V3_MARKS, "fim_hole": "<hole>"})
    with pytest.raises(BuildRefused, match=r"no token <hole>: .*--fim-hole, or give --fim-rate 0"):
        corpus("c", ["one"], tokenizer=other)
    assert documents(corpus("c", ["one"], tokenizer=other, fim_rate=0.0))
    same = TokenizerFile(bpe.path, {**V3_MARKS, "fim_hole": V3_MARKS["fim_end"]})
    with pytest.raises(BuildRefused, match="need tokens of their own"):
        corpus("d", ["one"], tokenizer=same)


def test_nothing_is_no_corpus(bpe, tmp_path, core):
    (tmp_path / "in.jsonl").write_text("")
    with pytest.raises(BuildRefused, match="no document"):
        build(
            Wanted((tmp_path / "in.jsonl",), bpe, tmp_path / "c", skip_bad=True), 1, nothing, nothing, nothing
        )
    assert files(tmp_path).keys() == {"in.jsonl"}


def test_a_sidecar_of_another_format_is_refused(corpus):
    prefix = corpus("c", ["one"])
    raw = json.loads(sidecar.place(prefix).read_text())
    for broken in ("{", "[]", json.dumps({**raw, "format": 99}), json.dumps({**raw, "more": 1})):
        sidecar.place(prefix).write_text(broken)
        with pytest.raises(sidecar.SidecarFault, match=r"c\.json is not"):
            sidecar.read(prefix)
