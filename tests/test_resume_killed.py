"""All processes of a run are killed inside saves: it ends with the numbers of a run that was left alone.

`DSPLUGINS_TEST_KILLS` says how often; `checkpoint/test_killed.py` shows the store alone, more often.
"""

from __future__ import annotations

import os
import random
import signal
import time
from contextlib import suppress
from pathlib import Path

from two_ranks import finish, ranks_of, rows, start

KILLS = int(os.environ.get("DSPLUGINS_TEST_KILLS", "3"))
STEPS = 2 * KILLS + 4
"""An attempt gets one step further, or two."""
EACH_STEP = ["save.every=1", f"train.steps={STEPS}"]
LONGEST = 0.06
"""Seconds after which a save of the tiny model is over."""


def alive(pid):
    """Whether it is a process still, and not only waits for somebody to ask how it ended."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def killed_inside_a_save(folder, chance):
    """Start the run and kill launcher and ranks `chance` after a save began; what the last one left."""
    checkpoints, process = folder / "run" / "checkpoints", start(folder, "run", *EACH_STEP)
    # Half of a step that is saved again now counts as seen: the kill then falls into the save after it.
    earlier, ranks = set(checkpoints.glob("*.partial")), []
    while not set(checkpoints.glob("*.partial")) - earlier:
        assert process.poll() is None, process.communicate()
        ranks = ranks if len(ranks) == 2 else ranks_of(process)
        time.sleep(0.001)
    assert len(ranks) == 2
    time.sleep(chance.uniform(0, LONGEST))
    for pid in (process.pid, *ranks):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait(30)
    while any(map(alive, ranks)):
        time.sleep(0.01)
    return sorted(entry.name for entry in checkpoints.glob("*.partial"))


def test_killed_inside_saves_it_ends_as_if_it_had_not_been(tmp_path):
    code, said = finish(start(tmp_path, "whole", *EACH_STEP))
    assert code == 0, said
    chance, left = random.Random(7), []
    for _ in range(KILLS):
        left.append(killed_inside_a_save(tmp_path, chance))
    print(f"half of a checkpoint was left {sum(map(bool, left))} times of {KILLS}")
    code, said = finish(start(tmp_path, "run", *EACH_STEP))
    assert code == 0 and "resumed from run/checkpoints/step-" in said, said
    assert sum(map(bool, left)) > KILLS / 4, f"saves were hardly ever interrupted: {left}"
    whole = rows(tmp_path, "whole")
    assert [row["step"] for row in whole] == list(range(1, STEPS + 1))
    assert rows(tmp_path, "run") == whole
