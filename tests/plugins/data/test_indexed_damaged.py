"""Corpora of the right size with the wrong numbers in them: told by name, before or while they are read."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dsplugins.contracts import EnvironmentUnfit
from dsplugins.corpora import reading
from dsplugins.corpora.reading import opened
from dsplugins.plugins.data.indexed import Indexed
from dsplugins.plugins.data.indexed_options import IndexedOptions
from dsplugins.schedules import Schedule

COUNT, HEAD = 40, 34
"""Documents; bytes before the lengths: magic, version, type and two counts."""


@pytest.fixture
def prefix(corpus):
    return corpus("c", [f"text {i} has words in it" for i in range(COUNT)], fim_rate=0.0)


def write(prefix, end, place, value, dtype):
    with prefix.with_name(f"c.{end}").open("r+b") as file:
        file.seek(place)
        file.write(np.array(value, dtype).tobytes())


@pytest.mark.parametrize("piece", [7, 1 << 20])
@pytest.mark.parametrize(
    ("place", "value", "dtype", "said"),
    [
        (HEAD + 4 * 3, -5, np.int32, "sequence 3 has -5 tokens"),
        (HEAD + 4 * 3, 3, np.int32, "sequence 4 does not begin where the one before it ends"),
        (HEAD + 4 * COUNT, 2, np.int64, "sequence 0 does not begin where"),
        (HEAD + 4 * COUNT + 8 * 7, 1 << 60, np.int64, "sequence 7 does not begin where"),
        (HEAD + 12 * COUNT, 5, np.int64, "its documents are not all of its sequences, in order"),
        (HEAD + 12 * COUNT + 8 * 20, 0, np.int64, "its documents are not all of its sequences, in order"),
    ],
)
def test_numbers_that_no_index_has(prefix, monkeypatch, piece, place, value, dtype, said):
    monkeypatch.setattr(reading, "PIECE", piece)
    assert len(opened(prefix)) == COUNT
    write(prefix, "idx", place, value, dtype)
    with pytest.raises(EnvironmentUnfit) as raised:
        opened(prefix)
    assert str(raised.value).startswith(f"{prefix}.idx is damaged: {said}")
    assert str(raised.value).endswith("; copy the corpus again, or build it again")


def test_a_token_that_the_tokenizer_does_not_have(prefix, plan, tmp_path):
    made = plan(seq_length=16)
    train = replace(made.train, steps=5, global_batch=Schedule.constant(8))
    planned = replace(made, train=train, run=replace(made.run, directory=str(tmp_path / "run")))
    data = Indexed(IndexedOptions(train=(str(prefix),), split=(3, 1))).ds_data(planned)
    tokens = np.fromfile(f"{prefix}.bin", np.uint16)
    assert tokens.max() == 511 and data.train(0).max() < 512
    np.full_like(tokens, 600).tofile(f"{prefix}.bin")
    for look in (data.train, data.validation):
        with pytest.raises(
            EnvironmentUnfit, match=f"^{prefix}.bin holds token 600, and its tokenizer has 512"
        ):
            look(0)
    with pytest.raises(EnvironmentUnfit, match="--verify"):
        data.prompt()
