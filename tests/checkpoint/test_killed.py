"""The store alone: a process killed at any instant of a save leaves the last finished checkpoint whole.

One process with tensors of its own; `test_resume_killed.py` kills a run of two ranks.
"""

from __future__ import annotations

import random
import subprocess
import sys
import textwrap

KILLS = 20
CHILD = """
    import os, signal, sys, time
    from pathlib import Path
    import torch
    import torch.distributed as dist
    from dsplugins.checkpoint import store
    from dsplugins.checkpoint.pieces import Piece

    folder = Path(sys.argv[1])

    def world():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        return dist.group.WORLD

    def held(step):
        rows = torch.full((400, 500), float(step))
        return [Piece(f"weights/{i}", (400, 500), (0, 0), rows, True) for i in range(5)]

    def save_for_ever(write):
        group, step = world(), 0
        found, damaged = store.newest_good(folder, group)
        assert not damaged, damaged
        if found:
            step = found.step
            into = held(-1)
            store.load(found, into, group)
            assert all((piece.data == step).all() for piece in into), "it holds another step's values"
        store.clear_partial(folder)
        os.write(write, b"%d " % step)
        while True:
            step += 1
            store.save(folder, step, held(step), {"step": step}, group)
            store.prune(folder, keep=2, keep_every=0)

    # Importing takes seconds: one process imports, and each of its children saves until it is killed.
    for delay in map(float, sys.argv[2:]):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            try:
                save_for_ever(write)
            except BaseException as error:
                os.write(write, repr(error).encode())
                os._exit(1)
        os.close(write)
        began = os.read(read, 4096)
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        print(began.decode() + os.read(read, 4096).decode(), len(list(folder.glob("*.partial"))))
        os.close(read)
"""


def test_killed_at_random_instants_of_a_save(tmp_path):
    chance = random.Random(20)
    delays = [f"{chance.uniform(0.0, 0.15):.4f}" for _ in range(KILLS)]
    line = [sys.executable, "-c", textwrap.dedent(CHILD), str(tmp_path), *delays]
    done = subprocess.run(line, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    said = [line.split() for line in done.stdout.splitlines()]
    assert len(said) == KILLS and all(len(words) == 2 and words[0].isdigit() for words in said), said
    steps = [int(step) for step, _ in said]
    assert steps == sorted(steps), "a finished checkpoint was lost"
    assert steps[-1] > 0, "no save was ever finished: the test shows nothing"
    assert sum(half != "0" for _, half in said) > KILLS / 4, "saves were hardly ever interrupted"
