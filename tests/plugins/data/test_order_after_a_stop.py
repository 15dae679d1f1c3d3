"""Which samples a step gets, by number and by token: the same ones whether a run stopped before it or not."""

from __future__ import annotations

import pytest

BEFORE, AFTER = 2, 3
"""Steps until the checkpoint, and steps behind it; both batches and the corpora's shares end within them."""


def taken(overrides, folder):
    """Per step the samples of an uninterrupted run, and those behind the checkpoint in a new assembly."""
    from pathlib import Path

    from runs import TINY, assembled

    from dsplugins.saver import Saver
    from dsplugins.step import Progress

    line = [*overrides, f"train.steps={BEFORE + AFTER}", "train.global_batch=8"]
    with assembled(line, str(TINY)) as run:
        saver = Saver(run, Path(folder))
        whole, progress = steps(run, Progress(), BEFORE)
        saver.save(progress)
        saver.close()
        whole += steps(run, progress, AFTER)[0]
    with assembled(line, str(TINY)) as run:
        progress, _ = Saver(run, Path(folder)).resume()
        return whole, steps(run, progress, AFTER)[0]


def steps(run, progress, count):
    """[(number, tokens) of each sample that the step asked for], a list a step."""
    from dsplugins.step import take_step

    found, sample = [], run.data.train

    def seen(index):
        found[-1].append((index, sample(index).tolist()))
        return sample(index)

    object.__setattr__(run.data, "train", seen)
    for _ in range(count):
        found.append([])
        progress = progress.after(take_step(run, progress))
    object.__setattr__(run.data, "train", sample)
    return found, progress


@pytest.mark.parametrize("source", ["python_source", "indexed"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_step_has_its_samples(workers, corpus, tmp_path, ranks, source):
    line = []
    if source == "indexed":
        web, code = (
            corpus(name, [f"{name} {i}: {i * i}" * 9 for i in range(80)]) for name in ("web", "code")
        )
        blend = f"[{{prefix: {web}, weight: 3.0}}, {{prefix: {code}, weight: 1.0}}]"
        line = [
            "plugins.python_source=null",
            f"plugins.indexed={{train: {blend}, split: [3, 1]}}",
            "model.vocab_size=512",
            f"run.directory={tmp_path / 'run'}",
        ]
    found = workers(ranks).run(taken, line, str(tmp_path / "checkpoints"))
    for whole, again in found:
        assert len(whole) == BEFORE + AFTER and all(len(step) == 8 // ranks for step in whole)
        assert again == whole[BEFORE:] != whole[:AFTER]
    numbers = sorted(number for whole, _ in found for step in whole for number, _ in step)
    assert numbers == list(range(8 * (BEFORE + AFTER))), "each sample once, over all ranks"
