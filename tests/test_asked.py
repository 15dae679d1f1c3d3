"""A run that is asked to stop while it looks at the validation split."""

from __future__ import annotations

import re


def asked_meanwhile(folder):
    """The last rank is asked in the evaluation after step 2; what every rank says of it, and the rows."""
    import signal
    from pathlib import Path

    import torch
    from runs import TINY, assembled

    from dsplugins import evaluate
    from dsplugins.recipe import Recipe
    from dsplugins.rundir import RunDirectory
    from dsplugins.show import Display
    from dsplugins.train import Loop
    from dsplugins.wishes import Stopped, Wishes

    wishes, plain = Wishes(), evaluate.evaluate

    def asked(run, step):
        if step == 2 and run.rank == torch.distributed.get_world_size() - 1:
            wishes.stop = signal.SIGTERM
        return plain(run, step)

    evaluate.evaluate = asked
    try:
        with assembled(["evaluate.every=2", "train.steps=6"]) as run:
            directory = RunDirectory(Path(folder))
            Loop(run, directory, Display(speaks=False), wishes).run(Recipe.load(str(TINY), []))
    except Stopped as stopped:
        return str(stopped), directory.steps(), sorted(directory.evaluated())
    finally:
        evaluate.evaluate = plain


def test_no_further_step_is_taken(workers, tmp_path):
    for said, steps, evaluated in workers(2).run(asked_meanwhile, str(tmp_path)):
        assert re.match(r"stopped by SIGTERM after step 2, saved in .*step-00000002; ", said)
        assert steps == 2 and evaluated == [2]
