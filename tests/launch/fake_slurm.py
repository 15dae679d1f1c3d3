"""sbatch, srun and scontrol on one machine: `python fake_slurm.py PROGRAM ARGUMENTS`. For tests only.

`sbatch` runs the job at once, and again as often as it asks to be requeued; `srun` really starts every task
of every "node", and hands SIGUSR1 on to them. What the time limit does, the signal that the script asked for
to the script of the first attempt, comes when the file `FAKE_TIME_IS_OVER` names has two lines. In
`FAKE_FOLDER` are what was submitted and the job's exit codes.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

FOLDER = Path(os.environ["FAKE_FOLDER"])


def sbatch(file):
    text = Path(file).read_text()
    (FOLDER / "submitted").write_text(text)
    options = dict(re.findall(r"^#SBATCH (--[\w-]+)=(.*)$", text, flags=re.MULTILINE))
    nodes, tasks = int(options["--nodes"]), int(options["--ntasks-per-node"])
    print("Submitted batch job 4242", flush=True)
    codes = []
    while not codes or (FOLDER / "requeued").exists():
        (FOLDER / "requeued").unlink(missing_ok=True)
        environment = {
            **os.environ,
            "SLURM_JOB_ID": "4242",
            "SLURM_JOB_NAME": options["--job-name"],
            "SLURM_JOB_NODELIST": f"node[0-{nodes - 1}]",
            "SLURM_NTASKS": str(nodes * tasks),
            "SLURM_RESTART_COUNT": str(len(codes)),
        }
        job = subprocess.Popen(["bash", file], env=environment, stderr=subprocess.STDOUT)
        if not codes:
            at_the_time_limit(job, options["--signal"])
        codes.append(job.wait())
        assert len(codes) < 9, codes
    (FOLDER / "codes").write_text(" ".join(map(str, codes)))
    return 0


def at_the_time_limit(job, wish):
    """`B:USR1@300` is for the script alone."""
    shell, name, _ = re.fullmatch(r"(B:)?(\w+)@(\d+)", wish).groups()
    assert shell
    over = Path(os.environ.get("FAKE_TIME_IS_OVER", "/nowhere"))
    while job.poll() is None:
        if over.exists() and len(over.read_text().splitlines()) >= 2:
            job.send_signal(signal.Signals[f"SIG{name}"])
            return
        time.sleep(0.01)


def srun(*arguments):
    count = next(i for i, word in enumerate(arguments) if not word.startswith("--"))
    options = dict(word.split("=", 1) for word in arguments[:count])
    nodes, tasks = int(options["--nodes"]), int(options["--ntasks-per-node"])
    started = [
        subprocess.Popen(arguments[count:], env=task(node, local, nodes, tasks), start_new_session=True)
        for node in range(nodes)
        for local in range(tasks)
    ]
    signal.signal(signal.SIGUSR1, lambda number, _: [each.send_signal(number) for each in started])
    limit = None
    while any(each.poll() is None for each in started):
        if limit is None and any(each.poll() is not None for each in started):
            limit = time.monotonic() + int(options.get("--wait", "60"))
        if limit is not None and time.monotonic() > limit:
            for each in started:
                each.kill()
        time.sleep(0.01)
    return max(code if code >= 0 else 128 - code for code in (each.wait() for each in started))


def task(node, local, nodes, tasks):
    return {
        **os.environ,
        "SLURM_PROCID": str(node * tasks + local),
        "SLURM_NODEID": str(node),
        "SLURM_LOCALID": str(local),
        "SLURM_STEP_NUM_NODES": str(nodes),
        "SLURM_STEP_NUM_TASKS": str(nodes * tasks),
        "SLURM_STEP_TASKS_PER_NODE": f"{tasks}(x{nodes})",
    }


def scontrol(what, *rest):
    if what == "requeue":
        (FOLDER / "requeued").touch()
        return 0
    assert (what, rest[0]) == ("show", "hostnames")
    print("localhost\n" * (int(re.findall(r"\d+", rest[1])[-1]) + 1), end="")
    return 0


if __name__ == "__main__":
    sys.exit({"sbatch": sbatch, "srun": srun, "scontrol": scontrol}[sys.argv[1]](*sys.argv[2:]))
