"""Text to ids and back, and that no text makes a mark."""

import pickle

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsplugins.corpora import tokenizer
from dsplugins.corpora.tokenizer import V3_MARKS, TokenizerFile

SPLICED = st.lists(st.one_of(st.text(max_size=8), st.sampled_from([*V3_MARKS.values(), "<", "｜>"]))).map(
    "".join
)


@given(SPLICED)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
def test_any_text_comes_back_and_makes_no_mark(bpe, text):
    (ids,) = bpe.encode([text])
    assert bpe.decode(ids) == text
    assert not set(ids) & set(bpe.ids.values())


def test_text_is_encoded_as_the_library_does_it(bpe):
    from tokenizers import Tokenizer

    texts = ["def f(self):\n    return 1\n", "", "ä 四"]
    theirs = Tokenizer.from_file(str(bpe.path))
    wanted = [theirs.encode(text, add_special_tokens=False).ids for text in texts]
    assert [ids.tolist() for ids in bpe.encode(texts)] == wanted


class Spy:
    """A tokenizer of the library that notes how much it is given in a call."""

    def __init__(self, theirs):
        self._theirs, self.calls = theirs, []

    def encode_batch_fast(self, texts, **options):
        self.calls.append([len(text) for text in texts])
        return self._theirs.encode_batch_fast(texts, **options)


def test_much_text_is_many_calls_of_the_same_tokens(bpe, monkeypatch):
    mark = V3_MARKS["fim_hole"]
    texts = ["def f(self):\n", "", "x" * 70, f"a{mark}" * 20, *(f"text {i} ä" for i in range(30)), "end"]
    wanted = [ids.tolist() for ids in bpe.encode(texts)]
    spy = Spy(bpe._tokenizer)
    monkeypatch.setitem(vars(bpe), "_tokenizer", spy)
    monkeypatch.setattr(tokenizer, "TOGETHER", 40)
    assert [ids.tolist() for ids in bpe.encode(texts)] == wanted
    assert all(sum(call) <= 40 or call == [70] for call in spy.calls) and [70] in spy.calls


def test_marks_are_the_last_ids(bpe):
    assert bpe.vocab_size == 512
    assert sorted(bpe.ids.values()) == [508, 509, 510, 511]
    assert bpe.decode([bpe.ids["fim_hole"], 100_000]) == V3_MARKS["fim_hole"]


def test_a_process_reads_the_file_once(bpe):
    first, second = (pickle.loads(pickle.dumps(bpe)) for _ in range(2))
    assert first is second and first == bpe


def test_another_file_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a tokenizer.json"):
        TokenizerFile(tmp_path / "tokenizer.json", V3_MARKS).ids  # noqa: B018
