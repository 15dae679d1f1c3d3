"""Lines to documents, and what is said of a line that is none."""

import json

import pytest

from dsplugins.corpora.documents import Bad, Document, documents
from dsplugins.corpora.sources import find, tasks


def read(path, key="text"):
    return [
        found for task in tasks(find([path], []), 64) for piece in task for found in documents(piece, key)
    ]


def test_each_line_is_a_document_with_a_name_and_its_bytes(tmp_path):
    file = tmp_path / "a.jsonl"
    texts = ["one", "zwei ä", "drei\nZeilen", "四"]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert read(file) == [
        Document(f"a.jsonl:{line}", text, len(text.encode())) for line, text in enumerate(texts, 1)
    ]
    file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    assert [document.text for document in read(file)] == texts


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"not json", "not JSON"),
        (b'{"text": "cut', "not JSON"),
        (b"[" * 100000, "not JSON"),
        (b'["text"]', "not a JSON object"),
        (b'{"content": "x"}', "no key 'text' (it has content)"),
        (b"{}", "no key 'text' (it has none)"),
        (b'{"text": 3}', "not a text (it is a int)"),
        (b'{"text": null}', "not a text"),
        (b'{"text": ""}', "empty text"),
        (b'{"text": "\xff"}', "not UTF-8 (byte 0xff at 10)"),
        (rb'{"text": "\ud83d"}', "half a surrogate pair"),
    ],
)
def test_a_bad_line_is_told_with_its_place(tmp_path, line, reason):
    file = tmp_path / "a.jsonl"
    good = b'{"text": "good"}\n'
    file.write_bytes(good * 30 + line + b"\n" + good)
    found = read(file)
    assert [one.text for one in found if isinstance(one, Document)] == ["good"] * 31
    (bad,) = (one for one in found if isinstance(one, Bad))
    assert str(bad).startswith(f"{file}:31: {reason}")


@pytest.mark.parametrize("empty", [b"", b"  \t", b"\r"])
def test_empty_lines_do_not_count_but_keep_their_numbers(tmp_path, empty):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "one"}\n' + empty + b'\n{"text": "two"}\n' + empty + b"\n")
    assert [(one.name, one.text) for one in read(file)] == [("a.jsonl:1", "one"), ("a.jsonl:3", "two")]


def test_a_mark_before_utf_8_is_no_text(tmp_path):
    for name, content in (("a.jsonl", b'{"text": "one"}\n'), ("a.txt", b"one")):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content)
        (document,) = read(tmp_path / name)
        assert (document.text, document.size) == ("one", 3)


def test_another_key(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"content": "x", "text": 3}\n')
    assert read(file, "content") == [Document("a.jsonl:1", "x", 1)]


def test_a_file_is_one_document(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("one\ntwo\n")
    assert read(file) == [Document("a.txt", "one\ntwo\n", 8)]
    file.write_bytes(b"one\ntwo\n\xff\n")
    assert [str(bad) for bad in read(file)] == [f"{file}:3: not UTF-8 (byte 0xff at 8)"]
    file.write_bytes(b"")
    assert [str(bad) for bad in read(file)] == [f"{file}:1: empty text"]


@pytest.mark.parametrize("name", ["a.json", "a.txt", "a"])
def test_lines_of_json_under_another_name_are_not_taken_for_one_text(tmp_path, name):
    """Megatron's own tools take `.json` for lines of JSON."""
    file = tmp_path / name
    file.write_text('{"text": "hello"}\n{"text": "world"}\n')
    (bad,) = read(file)
    assert (bad.path, bad.line, bad.reason) == (str(file), 1, "a line of JSON in a file that is no .jsonl")
    assert bad.detail == "it has the key 'text': name it .jsonl, and each line is a document"
    for text in ('{"text": 3}\n', '{"texts": "x"}\n', '{\n"text": "x"}\n', '{"text": "x"'):
        file.write_text(text)
        assert [document.text for document in read(file)] == [text]
    shouted = file.with_name("A.JSONL")
    shouted.write_text('{"text": "hello"}\n')
    assert [document.text for document in read(shouted)] == ["hello"]


def test_a_file_that_is_gone_is_told(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("x")
    (task,) = tasks(find([file], []))
    file.unlink()
    assert [str(bad) for bad in documents(task[0], "text")] == [
        f"{file}:1: can't be read (No such file or directory)"
    ]
