"""Which files are read, and that a file's side depends on its name alone."""

import pytest

from dsplugins.contracts import EnvironmentUnfit
from dsplugins.plugins.data.files import Document, read_documents, split_documents, standard_library

HUNDREDS = tuple(Document(f"pkg/m{i}.py", b"x = %d\n" % i) for i in range(2000))


def names(documents):
    return [document.name for document in documents]


def test_reads_sources_and_nothing_else(corpus_folder):
    found = names(read_documents(corpus_folder, tests=False, max_bytes=None))
    assert len(found) == 60 and found == sorted(found)
    assert set(found) == {f"pkg{i % 3}/module{i}.py" for i in range(60)}


def test_tests_are_read_when_asked_for(corpus_folder):
    found = names(read_documents(corpus_folder, tests=True, max_bytes=None))
    assert len(found) == 61 and "pkg1/tests/test_it.py" in found


def test_of_equal_contents_the_first_is_read(corpus_folder):
    (corpus_folder / "a_copy.py").write_bytes((corpus_folder / "pkg0" / "module3.py").read_bytes())
    found = names(read_documents(corpus_folder, tests=False, max_bytes=None))
    assert "a_copy.py" in found and "pkg0/module3.py" not in found


def test_max_bytes_is_a_bound_and_stable_under_new_files(corpus_folder):
    few = read_documents(corpus_folder, tests=False, max_bytes=3000)
    total = sum(len(document.content) for document in few)
    assert 2000 < total <= 3000
    assert len({name.split("/")[0] for name in names(few)}) == 3, "drawn from everywhere"
    (corpus_folder / "notes2.txt").write_text("no source")
    assert read_documents(corpus_folder, tests=False, max_bytes=3000) == few


@pytest.mark.parametrize("folder", ["nowhere", "."])
def test_no_sources_is_an_unfit_environment(tmp_path, folder):
    with pytest.raises(EnvironmentUnfit, match=r"no Python sources"):
        read_documents(tmp_path / folder, tests=False, max_bytes=None)


def test_split_is_a_partition_of_about_the_asked_share():
    split = split_documents(HUNDREDS, 0.05)
    assert set(split.train) | set(split.validation) == set(HUNDREDS)
    assert not set(split.train) & set(split.validation)
    assert 60 <= len(split.validation) <= 140, "2000 x 0.05 +- 4 sigma"


def test_sides_never_change_when_files_come_and_go():
    whole, half = split_documents(HUNDREDS, 0.05), split_documents(HUNDREDS[::2], 0.05)
    assert set(half.validation) == set(whole.validation) & set(HUNDREDS[::2])


def test_a_larger_share_only_adds():
    small, large = split_documents(HUNDREDS, 0.05), split_documents(HUNDREDS, 0.1)
    assert set(small.validation) < set(large.validation)


def test_sides_are_pinned():
    # Published numbers depend on the split: a change here must be a decision.
    split = split_documents(HUNDREDS[:100], 0.05)
    assert names(split.validation) == [
        "pkg/m14.py",
        "pkg/m22.py",
        "pkg/m29.py",
        "pkg/m55.py",
        "pkg/m70.py",
        "pkg/m80.py",
    ]


def test_digest_sees_names_contents_and_sides():
    one, two = Document("a.py", b"1"), Document("b.py", b"2")
    base = split_documents([one, two], 0.0)
    others = [
        split_documents([one, Document("b.py", b"3")], 0.0),
        split_documents([one, Document("c.py", b"2")], 0.0),
        split_documents([one], 0.0),
        split_documents([one, two], 1.0),
    ]
    assert len({base.digest, *(other.digest for other in others)}) == 5
    assert base.digest == split_documents([one, two], 0.0).digest


def test_the_standard_library_is_here():
    documents = read_documents(standard_library(), tests=False, max_bytes=None)
    assert {"argparse.py", "json/decoder.py"} <= set(names(documents))
    assert sum(len(document.content) for document in documents) > 5_000_000
    assert not any("site-packages" in name or "/test/" in name for name in names(documents))
