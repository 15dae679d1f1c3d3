"""What is counted for `experiment memory`: what autograd holds, without weights and what was dropped."""

from __future__ import annotations

import pytest

from dsplugins.experiments import memory

RECOMPUTE = ["plugins.v3_recompute={mla_up_proj: false}"]


def held(overrides):
    """Bytes for one micro-batch, and what recomputation says it avoids."""
    from runs import assembled

    from dsplugins.experiments.memory_rank import activations
    from dsplugins.model import bare

    with assembled(overrides) as run:
        report = getattr(bare(run.chunks[0]), "ds_recompute_report", None)
        found = activations(run)
        return found, report.avoided_bytes if report else 0


def both(workers, first, second):
    return [workers(1).run(held, overrides)[0] for overrides in (first, second)]


def test_two_sequences_hold_twice_as_much_as_one(workers):
    (one, _), (two, _) = both(workers, ["train.micro_batch=1"], ["train.micro_batch=2"])
    assert two == pytest.approx(2 * one, rel=0.03)


def test_recomputation_saves_what_its_report_says(workers):
    (whole, _), (less, avoided) = both(workers, [], RECOMPUTE)
    assert avoided > 0 and whole - less == pytest.approx(avoided, rel=0.1)


def test_weights_are_not_activations(workers):
    """A wider vocabulary adds weights by the thousand, and only its logits to what is held."""
    (narrow, _), (wide, _) = both(workers, [], ["model.vocab_size=328"])
    logits = 4 * 2 * 32 * 64 * 4  # sequences, main and MTP head, S, 64 more tokens, FP32
    assert logits <= wide - narrow <= 3 * logits


def test_the_table_is_the_record():
    rows = [{"way": way, "weights": 2**20 * n, "state": 3 * 2**19} for n, way in enumerate(memory.WAYS)]
    table = memory.table(memory.results(rows, ["x=1"]))
    assert table[0] == ["WAY", "WEIGHTS, MiB", "STATE, MiB"]
    assert table[2] == ["moments in BF16", "1.000", "1.500"] and len(table) == 1 + len(memory.WAYS)
