"""Bytes to tokens and back."""

from hypothesis import given
from hypothesis import strategies as st

from dsplugins.plugins.data.tokens import EOS, FIM_HOLE, SPECIALS, VOCAB_SIZE, decode, encode


@given(st.text())
def test_round_trip(text):
    assert decode(encode(text.encode("utf-8", "surrogatepass"))) == text.encode(
        "utf-8", "surrogatepass"
    ).decode("utf-8", "replace")


@given(st.lists(st.integers(0, 400)))
def test_any_id_can_be_shown(tokens):
    assert isinstance(decode(tokens), str)


def test_marks_and_strays_are_shown_in_brackets():
    assert decode([104, 105, EOS, FIM_HOLE, 300, 33]) == "hi<eos><fim_hole><300>!"


def test_broken_utf8_is_replaced():
    assert decode([0xC3, EOS, 0xA4]) == "\ufffd<eos>\ufffd"
    assert decode([0xC3, 0xA4]) == "ä"


def test_the_vocabulary_is_exact():
    assert sorted(SPECIALS) == list(range(256, VOCAB_SIZE))
