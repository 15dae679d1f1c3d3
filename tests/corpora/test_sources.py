"""Which files are read, and that pieces are whole lines with the right numbers."""

import os

import pytest

from dsplugins.corpora.sources import find, left_out, tasks


def names(files):
    return [file.name for file in files]


def test_a_folder_gives_its_files_by_name(tmp_path):
    for name in ("b.txt", "a.jsonl", "deep/er/c.txt", "d.bin"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x\n")
    assert names(find([tmp_path], ["*.jsonl", "*.txt"])) == ["a.jsonl", "b.txt", "deep/er/c.txt"]
    assert names(find([tmp_path / "d.bin", tmp_path], ["c.*"])) == ["d.bin", "deep/er/c.txt"]


def test_what_is_left_out_is_counted_by_ending(tmp_path):
    names = ("a.jsonl", "b.jsonl.gz", "c.jsonl.gz", "v1.2.md", "deep/d.md", "LICENSE")
    for name in names:
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text("x\n")
    (tmp_path / "in" / "gone.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "other").mkdir()
    (tmp_path / "in" / "other").symlink_to(tmp_path / "other")
    found = left_out([tmp_path / "in", tmp_path / "in" / "v1.2.md"], ["*.jsonl", "*.txt"])
    kinds = {".jsonl.gz": 2, ".md": 2, "without an ending": 1, "broken link": 1, "link to a folder": 1}
    assert found == kinds


@pytest.mark.parametrize(
    ("name", "said"),
    [("x.jsonl.gz", "unpack it first"), ("x.GZ", "unpack it first"), ("x.md", "give a --pattern")],
)
def test_what_can_not_be_read_is_refused(tmp_path, name, said):
    (tmp_path / name).write_text("x")
    with pytest.raises(ValueError, match=said):
        find([tmp_path], ["*.txt", "*.gz", "*.GZ"])


def test_a_pipe_is_refused_before_it_is_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=r"pipe is a pipe or the like: write it to a file first"):
        find([tmp_path / "pipe"], [])


def test_a_file_is_not_read_twice(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match=r"a\.txt is given twice"):
        find([tmp_path, tmp_path / "a.txt"], ["*.txt"])


def test_files_of_one_name_are_told_apart(tmp_path):
    for folder in ("a", "b", "c"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "part.jsonl").write_text("x\n")
        (tmp_path / folder / f"{folder}.txt").write_text("x\n")
    given = [tmp_path / "a", tmp_path / "b" / "part.jsonl", tmp_path / "c"]
    found = find(given, ["*.jsonl", "*.txt"])
    assert names(found) == ["a.txt", "part.jsonl", "part.jsonl#2", "c.txt", "part.jsonl#3"]


@pytest.mark.parametrize("size", [1, 10, 100, 10**6])
@pytest.mark.parametrize("end", ["", "\n"])
def test_pieces_are_whole_lines_and_together_the_file(tmp_path, size, end):
    lines = [f"line {i} " + "x" * (i * 7 % 23) for i in range(40)]
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(lines) + end)
    pieces = [piece for task in tasks(find([file], []), size) for piece in task]
    content = file.read_bytes()
    assert b"".join(content[piece.start : piece.stop] for piece in pieces) == content
    for piece in pieces:
        first = content[piece.start : piece.stop].split(b"\n")[0].decode()
        assert first == lines[piece.first_line - 1]


def test_a_line_that_is_longer_than_a_piece_is_one(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("one\n" + "x" * 300 + "\ntwo\nthree\n" + "y" * 100)
    pieces = [piece for task in tasks(find([file], []), 20) for piece in task]
    assert [(piece.first_line, piece.size) for piece in pieces] == [(1, 4), (2, 301), (3, 10), (5, 100)]
    assert pieces[1].place == f"{file}:2"


def test_small_files_travel_together_and_in_order(tmp_path):
    for i in range(10):
        (tmp_path / f"{i}.txt").write_text("x" * 30)
    bundles = list(tasks(find([tmp_path], ["*.txt"]), 100))
    assert [len(bundle) for bundle in bundles] == [4, 4, 2]
    assert [piece.file.name for bundle in bundles for piece in bundle] == [f"{i}.txt" for i in range(10)]
