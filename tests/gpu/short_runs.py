"""Some steps of the tiny recipe on a GPU, and what may be between two such runs."""

from __future__ import annotations

RECIPE = "deepseek_v3/tiny_gpu.yaml"
STEPS = 5
SHORT = (f"train.steps={STEPS}", "evaluate.sequences=8", "plugins.expert_load=null", "plugins.curves=null")
ON_CPU = ("plugins.cuda=null", "plugins.cpu={}")
PRECISIONS = {"fp32": ("plugins.bf16=null", "plugins.fp32={}"), "bf16": ()}
BACKENDS = {"torch_local": (), "te": ("plugins.torch_local=null", "plugins.te={}")}
NUMBERS = ("step", "tokens", "loss", "mtp_loss", "aux_loss", "grad_norm", "max_vio", "learning_rate")
# Relative, a step. The first two see the initial weights: the learning rate starts at 0. FP32 kernels differ
# by the order of their sums, some 1e-6. On the CPU, this recipe in BF16 is up to 5e-5 from FP32 in these two
# steps and up to 2.5e-3 in the next three, and two ways to round to BF16 may lie on both sides of FP32; a
# step that is missing, or taken twice, is 2e-2. TransformerEngine multiplies FP32 as TF32, with 3 bits more
# than BF16.
TIGHT = (1e-4,) * STEPS
LOOSE = (2e-4, 2e-4, 5e-3, 5e-3, 5e-3)


def apart(mine, theirs, bounds):
    """What differs by more than its bound: (step, number, relative difference)."""
    found = []
    for row, other, bound in zip(mine, theirs, bounds, strict=True):
        for name in ("loss", "mtp_loss"):
            difference = abs(row[name] - other[name]) / abs(other[name])
            if not difference <= bound:  # also where it is not a number
                found.append((row["step"], name, difference))
    return found


def numbers(rows):
    """What a repetition has to repeat."""
    return [{name: row[name] for name in NUMBERS} for row in rows]


def train_on(overrides, recipe=RECIPE):
    from runs import trained

    return trained(list(overrides), recipe)


def stopped_and_resumed(overrides, recipe, folder):
    """(rows of all steps, rows of those after a checkpoint, taken by a new assembly that reads it)."""
    from pathlib import Path

    from runs import assembled

    from dsplugins.saver import Saver
    from dsplugins.step import Progress

    with assembled(list(overrides), recipe) as run:
        saver = Saver(run, Path(folder))
        rows, progress = steps(run, Progress(), 2)
        saver.save(progress)
        saver.close()
        later, _ = steps(run, progress, 2)
    with assembled(list(overrides), recipe) as run:
        progress, _ = Saver(run, Path(folder)).resume()
        again, _ = steps(run, progress, 2)
    return rows + later, again


def steps(run, progress, count):
    from dsplugins.step import take_step
    from dsplugins.train import as_row

    rows = []
    for _ in range(count):
        step = take_step(run, progress)
        progress = progress.after(step)
        rows.append(as_row(step, run.plan.data.seq_length))
    return rows, progress
