"""A document that memory can't hold is told before, or at least afterwards, with its place and what to do."""

import pytest

from dsplugins.contracts import EnvironmentUnfit
from dsplugins.corpora import build as building
from dsplugins.corpora import memory, sources
from dsplugins.corpora.build import Wanted, build
from dsplugins.corpora.pool import ProcessLost
from dsplugins.corpora.tokenizer import TokenizerFile

MIB = 1 << 20


def nothing(*_):
    pass


@pytest.fixture
def little(monkeypatch):
    """A machine with 1 MiB of free memory, on which a document of 2 KiB is large."""
    monkeypatch.setattr(memory, "available", lambda: MIB)
    monkeypatch.setattr(memory, "LARGE", 2048)


@pytest.fixture
def encoded(monkeypatch):
    """Texts that reached the tokenizer."""
    found, theirs = [], TokenizerFile.encode

    def noted(self, texts):
        found.extend(texts)
        return theirs(self, texts)

    monkeypatch.setattr(TokenizerFile, "encode", noted)
    return found


def test_a_file_that_is_too_large_is_refused_before_any_is_read(bpe, core, tmp_path, little, encoded):
    (tmp_path / "a.txt").write_text("small")
    (tmp_path / "b.txt").write_text("x" * 16 * 1024)
    wanted = Wanted((tmp_path / "a.txt", tmp_path / "b.txt"), bpe, tmp_path / "made" / "c")
    with pytest.raises(EnvironmentUnfit) as caught:
        build(wanted, 1, nothing, nothing, nothing)
    assert str(caught.value) == (
        f"{tmp_path}/b.txt is one document of 16 KiB, which takes 1.3 MiB of memory or more, and 1.0 MiB are "
        "free: split it into documents, a file each or a line of a *.jsonl each"
    )
    assert encoded == [] and not (tmp_path / "made").exists()


def test_a_line_that_is_too_large_is_told_by_its_number(corpus, tmp_path, little, encoded, monkeypatch):
    assert memory.LARGE > 1024
    monkeypatch.setattr(sources.tasks, "__defaults__", (1024,))
    corpus("fits", ["one", "x" * 8 * 1024])
    encoded.clear()
    with pytest.raises(
        EnvironmentUnfit, match=r"/c\.jsonl:3 is one document of 13 KiB, which takes 1\.1 MiB"
    ):
        corpus("c", ["one", "two", "x" * 13 * 1024])
    assert max(map(len, encoded), default=0) < 1024 and not list(tmp_path.glob("c.*[!l]"))


@pytest.mark.parametrize("large", [True, False])
def test_of_a_process_that_was_killed_the_largest_document_is_told(corpus, little, monkeypatch, large):
    def killed(work, tasks, workers, idle):
        first, *_ = tasks
        yield work(first)
        raise ProcessLost("a process ended")

    monkeypatch.setattr(building, "ordered", killed)
    monkeypatch.setattr(sources.tasks, "__defaults__", (1024,))
    with pytest.raises(EnvironmentUnfit) as caught:
        corpus("c", ["y" * 6000, "one", "x" * (4000 if large else 1500), "two"])
    said = str(caught.value)
    assert said.startswith("one of the processes was killed (out of memory?), and nothing was written")
    if large:
        assert "/c.jsonl:3 is one document of 4 KiB, which takes 0.3 MiB" in said and "split it into" in said
    assert said.endswith(
        ", or take fewer --workers" if large else "nothing was written: take fewer --workers"
    )


def put(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MEMINFO = {"proc/meminfo": "MemTotal:  9000 kB\nMemAvailable:  8000 kB\nHugePages_Total:  0\n"}
V2 = {
    "proc/self/cgroup": "0::/job/step\n",
    "sys/fs/cgroup/job/memory.max": "5000000\n",
    "sys/fs/cgroup/job/memory.current": "4500000\n",
    "sys/fs/cgroup/job/memory.stat": "anon 4\ninactive_file 300000\n",
    "sys/fs/cgroup/job/step/memory.max": "max\n",
    "sys/fs/cgroup/job/step/memory.current": "4000000\n",
}
V1 = {
    "proc/self/cgroup": "5:devices:/\n4:memory:/job\n0::/\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
    "sys/fs/cgroup/memory/memory.usage_in_bytes": "6000000\n",
    "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "5000000\n",
    "sys/fs/cgroup/memory/job/memory.usage_in_bytes": "4500000\n",
    "sys/fs/cgroup/memory/job/memory.stat": "total_inactive_file 100000\n",
}


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, None),
        (MEMINFO, 8000 * 1024),
        ({**MEMINFO, **V2}, 800_000),
        ({**MEMINFO, **V1}, 600_000),
        ({**V2, "sys/fs/cgroup/job/memory.current": "9000000"}, 0),
    ],
)
def test_what_is_free_is_what_the_machine_and_each_group_leave(tmp_path, files, free):
    assert memory.available(put(tmp_path, files)) == free


def test_this_machine_tells():
    assert memory.available() is None or memory.available() > 0
