"""Rows and totals of reports made by hand."""

from __future__ import annotations

from dsplugins.plugins.event.wire.table import Table, totals
from dsplugins.plugins.event.wire.tally import Key, Traffic

A, B, C = Key("all_to_all", "expert"), Key("all_reduce", "world"), Key("send", "pipeline")


def reports(factor=1):
    """Of two ranks: an uneven all-to-all, a sum that nobody predicted, a message that never came."""
    first = {A: Traffic(4, 1000 * factor, 600 * factor), B: Traffic(1, 8, 8)}
    second = {A: Traffic(4, 3000 * factor, 1400 * factor), B: Traffic(1, 8, 8)}
    return [(first, {A: 2000 * factor, C: 64}), (second, {A: 2000 * factor})]


def test_rows_are_means_over_ranks_and_steps():
    table = Table()
    table.add(2, reports())
    table.add(10, reports(factor=3))
    found = {(row.kind, row.group): row for row in table.rows()}
    assert list(found) == [A, B, C], "most bytes first"
    assert (found[A].calls, found[A].payload, found[A].predicted) == (4, 4000, 4000)
    assert (found[A].sent, found[A].sent_max) == (2000, 2800)
    assert found[B].predicted is None and found[B].payload == 8
    assert (found[C].calls, found[C].payload, found[C].predicted) == (0, 0, 32)


def test_lines_hide_nothing():
    table = Table()
    table.add(2, reports())
    assert dict(table.lines()) == {
        "all_to_all in expert": "4 calls, 1 kB sent, 1.4 kB at most; payload 2 kB, as predicted",
        "all_reduce in world": "1 calls, 8 B sent; payload 8 B, not predicted",
        "send in pipeline": "0 calls, 0 B sent; payload 0 B, predicted 32 B",
    }
    assert table.as_json()["steps"] == [2] and len(table.as_json()["rows"]) == 3


def test_totals_take_all_rows_together():
    assert totals(reports()) == {"wire_bytes": (608 + 1408) / 2, "wire_bytes_max": 1408, "wire_calls": 5}
