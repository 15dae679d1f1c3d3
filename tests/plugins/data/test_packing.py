"""The endless stream: every token once an epoch, pure by index."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsplugins.plugins.data.packing import Stream, Windows


def stream(lengths=(5, 1, 9, 3, 12, 7), seed=1):
    """Every token of the corpus is distinct."""
    ends = np.cumsum(lengths)
    documents = [
        np.arange(end - length, end, dtype=np.uint16) for length, end in zip(lengths, ends, strict=True)
    ]
    return Stream([f"{i}.py" for i in range(len(lengths))], documents, seed), documents


def test_an_epoch_is_its_documents_in_its_order():
    packed, documents = stream()
    for epoch in range(4):
        expected = np.concatenate([documents[i] for i in packed.order(epoch)])
        assert packed.read(epoch * 37, 37).tolist() == expected.tolist()


def test_samples_cover_every_token_once_an_epoch():
    packed, _ = stream()
    for length in (1, 4, 37, 50):
        # `length` epochs hold a whole number of samples whatever 37 and `length` are.
        inputs, targets = Counter(), Counter()
        for i in range(37):
            sample = packed.read(i * length, length + 1).tolist()
            inputs.update(sample[:-1])
            targets.update(sample[1:])
        assert inputs == dict.fromkeys(range(37), length)
        assert sum(targets.values()) == 37 * length
        assert max(targets.values()) <= length + 1 and min(targets.values()) >= length - 1


@given(st.integers(0, 500), st.integers(1, 120), st.integers(0, 5))
def test_a_read_is_a_slice_of_the_whole(start, length, seed):
    packed, documents = stream(seed=seed)
    epochs = (start + length) // 37 + 1
    whole = np.concatenate([documents[i] for epoch in range(epochs) for i in packed.order(epoch)])
    assert packed.read(start, length).tolist() == whole[start : start + length].tolist()


def test_reads_do_not_depend_on_what_was_read_before():
    packed, _ = stream()
    places = [0, 400, 36, 5000, 0, 72, 400]
    assert [packed.read(p, 9).tolist() for p in places] == [stream()[0].read(p, 9).tolist() for p in places]


def test_epochs_and_seeds_have_their_own_order():
    packed, other = stream(lengths=[2] * 40)[0], stream(lengths=[2] * 40, seed=2)[0]
    orders = [tuple(p.order(epoch)) for p in (packed, other) for epoch in range(5)]
    assert len(set(orders)) == 10
    assert all(sorted(order) == list(range(40)) for order in orders)


def test_far_epochs_are_as_near_as_the_first():
    packed, _ = stream()
    assert sorted(packed.read(37 * 10**9, 37).tolist()) == list(range(37))


@pytest.mark.parametrize(
    ("tokens", "length", "count"), [(33, 8, 4), (32, 8, 3), (8, 8, 0), (2, 1, 1), (0, 4, 0)]
)
def test_windows_are_whole_and_each_comes_once(tokens, length, count):
    windows = Windows(np.arange(tokens, dtype=np.uint16), length)
    assert windows.count == count
    read = [windows.read(i).tolist() for i in range(count)]
    assert all(len(window) == length + 1 for window in read)
    assert sorted(window[0] for window in read) == [length * i for i in range(count)]
    assert all(window == list(range(window[0], window[0] + length + 1)) for window in read)


def test_there_are_no_windows_beyond():
    windows = Windows(np.arange(33, dtype=np.uint16), 8)
    for index in (-1, 4):
        with pytest.raises(IndexError):
            windows.read(index)


@pytest.mark.parametrize("count", [1, 2, 64, 1000, 3421])
def test_first_windows_speak_for_the_whole(count):
    windows = Windows(np.arange(2 * count + 1, dtype=np.uint16), 2)
    eighths = {int(windows.read(i)[0]) * 4 // count for i in range(min(count, 24))}
    assert len(eighths) == min(count, 8)


def test_every_sample_comes_once_a_block_in_an_order_of_its_own():
    from dsplugins.plugins.data.packing import Order

    order = Order(50, seed=1)
    first, second = [order[i] for i in range(50)], [order[i] for i in range(50, 100)]
    assert sorted(first) == list(range(50)) and sorted(second) == list(range(50, 100))
    assert first != list(range(50)) and [i - 50 for i in second] != first
    assert [Order(50, seed=1)[i] for i in (60, 3)] == [second[10], first[3]], "order of reads does not matter"
    assert [Order(50, seed=2)[i] for i in range(50)] != first
