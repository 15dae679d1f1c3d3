"""Fill-in-middle: form, rate, and that no byte is lost."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsplugins.plugins.data.files import Document
from dsplugins.plugins.data.fim import training_tokens

BEGIN, HOLE, END, EOS = 257, 258, 259, 256


def restored(tokens):
    """Prefix, middle, suffix by the marks, independent of how they were put in."""
    tokens = [int(token) for token in tokens]
    assert tokens[0] == BEGIN and tokens[-1] == EOS
    assert [token for token in tokens if token > 255] == [BEGIN, HOLE, END, EOS]
    hole, end = tokens.index(HOLE), tokens.index(END)
    return bytes(tokens[1:hole]), bytes(tokens[end + 1 : -1]), bytes(tokens[hole + 1 : end])


@given(st.binary(min_size=1), st.text(min_size=1), st.integers(0, 9))
def test_a_turned_document_can_be_restored(content, name, seed):
    prefix, middle, suffix = restored(training_tokens(Document(name, content), seed=seed, rate=1.0))
    assert prefix + middle + suffix == content


def test_rate_zero_turns_nothing():
    for i in range(200):
        tokens = training_tokens(Document(f"{i}.py", b"abc"), seed=3, rate=0.0)
        assert tokens.tolist() == [97, 98, 99, EOS]


def test_about_a_tenth_is_turned():
    documents = [Document(f"{i}.py", b"text") for i in range(4000)]
    turned = sum(training_tokens(document, seed=7, rate=0.1)[0] == BEGIN for document in documents)
    assert 0.08 < turned / 4000 < 0.12, "4 sigma are 0.019"


def test_cuts_are_uniform_and_apart():
    content = bytes(100)
    parts = [restored(training_tokens(Document(f"{i}", content), seed=1, rate=1.0)) for i in range(2000)]
    prefix, middle, suffix = np.array([[len(part) for part in three] for three in parts]).mean(axis=0)
    # Two uniform cuts divide a line into thirds on average; sigma of the mean is 0.53.
    assert prefix == pytest.approx(33.3, abs=2.5) and suffix == pytest.approx(33.3, abs=2.5)
    assert middle == pytest.approx(33.3, abs=2.5)


def test_only_seed_and_name_decide():
    document = Document("pkg/a.py", b"some text to cut" * 9)
    once = training_tokens(document, seed=5, rate=1.0).tolist()
    assert training_tokens(document, seed=5, rate=1.0).tolist() == once
    assert training_tokens(document, seed=6, rate=1.0).tolist() != once
    assert training_tokens(Document("pkg/b.py", document.content), seed=5, rate=1.0).tolist() != once


def test_a_higher_rate_turns_the_same_documents_and_more():
    documents = [Document(f"{i}.py", b"text") for i in range(300)]

    def turned(rate):
        return {d.name for d in documents if training_tokens(d, seed=2, rate=rate)[0] == BEGIN}

    assert turned(0.1) < turned(0.5) < turned(1.0)
