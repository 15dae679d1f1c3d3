"""Text to ids and back, and that no text makes a mark."""

import pickle

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

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
    assert list(bpe.encode(texts)) == [theirs.encode(text, add_special_tokens=False).ids for text in texts]


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
