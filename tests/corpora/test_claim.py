"""Whose a corpus is while it is built: what is refused, what is taken over, by one of many alone."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

import pytest

from dsplugins.contracts import EnvironmentUnfit
from dsplugins.corpora.build import build
from dsplugins.corpora.claim import Claim, Occupied, Owner, claimed


@pytest.fixture
def out(tmp_path):
    return tmp_path / "c"


@pytest.fixture(scope="module")
def gone():
    """A process of this machine that has ended."""
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return replace(Owner.here(), pid=done.pid, began="1")


def leave(out, owner):
    out.with_name("c.building").write_text(json.dumps(asdict(owner)))


def test_one_at_a_time(out):
    told = []
    with claimed(out, told.append) as claim:
        said = f"another build of {out} is under way, by process {os.getpid()} of {claim.owner.host}, since 2"
        with pytest.raises(Occupied) as caught, claimed(out, told.append):
            pass
        assert str(caught.value).startswith(said)
        assert str(caught.value).endswith(": wait for it, or choose another --out")
        claim.keep()
    assert not list(out.parent.iterdir()) and told == []


def test_another_machine_is_never_taken_for_gone(out, gone):
    leave(out, replace(gone, host="node7", machine="another"))
    with pytest.raises(Occupied, match=r"by process .* of node7, since .* if it has, remove .*/c\.building$"):
        Claim(out).take(print)
    assert out.with_name("c.building").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}'])
def test_a_file_that_says_nothing_is_left_alone(out, text):
    out.with_name("c.building").write_text(text)
    with pytest.raises(Occupied, match="has begun at this moment, or was cut off"):
        Claim(out).take(print)
    assert out.with_name("c.building").read_text() == text


@pytest.mark.parametrize("again", [False, True])
def test_what_is_left_here_is_taken_over_and_told(out, gone, again):
    """Also where the number of its process is another one's now: this one's, which began later."""
    left = replace(gone, pid=os.getpid()) if again else gone
    leave(out, left)
    told = []
    with claimed(out, told.append) as claim:
        assert told == [f"{out}.building was left by {left}, which has ended: taken over"]
        claim.keep()
        with pytest.raises(Occupied, match=f"by process {os.getpid()}"):
            Claim(out).take(print)
    assert not list(out.parent.iterdir())


def test_of_many_one_takes_over(out, gone):
    def tries(_):
        claim = Claim(out)
        try:
            claim.take(lambda said: None)
        except Occupied:
            return None
        return claim

    with ThreadPoolExecutor(8) as pool:
        for _ in range(40):
            leave(out, gone)
            (won,) = filter(None, pool.map(tries, range(8)))
            won.keep()
            won.leave()
            assert not list(out.parent.iterdir())


def test_where_nothing_locks_a_person_removes_it(out, gone, monkeypatch):
    def none(*_):
        raise OSError(38, "Function not implemented")

    leave(out, gone)
    monkeypatch.setattr("fcntl.flock", none)
    with pytest.raises(Occupied, match=r"can't be taken over \(Function not implemented\): remove it"):
        Claim(out).take(print)


def test_a_file_that_a_person_removed_too_early(out, corpus, monkeypatch):
    """Another build has begun: this one writes nothing and leaves the other's."""
    other = Owner.here()

    def taken(progress):
        leave(out, other)

    monkeypatch.setattr("small_bpe.build", lambda *given: build(*given[:3], taken, given[4]))
    with pytest.raises(EnvironmentUnfit, match=r"building, which kept .* is gone or another one's: nothing"):
        corpus("c", ["one", "two"])
    assert sorted(file.name for file in out.parent.iterdir()) == ["c.building", "c.jsonl"]
    assert json.loads(out.with_name("c.building").read_text()) == asdict(other)
