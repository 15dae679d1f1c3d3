"""Local ranks: exit codes pass through, one failure ends all, signals reach everyone."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

from dsplugins import launcher
from dsplugins.launcher import Outcome, run_local
from dsplugins.rank import inside_torchrun

SLEEPS = "import os, sys, time, signal, pathlib; rank = int(os.environ['RANK'])\n"
LAUNCHER = (
    # A shell starts what runs in its background without SIGINT; these tests are about a terminal.
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    "from dsplugins.launcher import run_local; sys.exit(run_local(2, [], sys.argv[1:]).code)"
)


def outcome(world_size, program):
    """How `world_size` processes ended that run `program`, which knows its `rank`."""
    return run_local(world_size, [], [sys.executable, "-c", SLEEPS + program])


def ranks(world_size, program):
    """Exit code of the same."""
    return outcome(world_size, program).code


def started(program):
    """A launcher in a process and a group of its own, with two ranks."""
    line = [sys.executable, "-c", LAUNCHER, sys.executable, "-c", SLEEPS + program]
    return subprocess.Popen(line, start_new_session=True)


def until(there, seconds=120.0):
    """Wait until `there()` is true."""
    deadline = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def ended(process_id):
    """Whether a process is gone, or is a zombie that nobody has collected."""
    try:
        return open(f"/proc/{process_id}/stat").read().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.parametrize("code", [0, 3, 4, 75])
def test_codes_pass_through(code):
    assert ranks(2, f"sys.exit({code} if rank == 1 else 0)") == code


def test_one_failure_ends_the_others():
    began = time.monotonic()
    assert ranks(2, "time.sleep(60 if rank == 0 else 0); sys.exit(3)") == 3
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(("end", "code"), [("os._exit(4)", 4), ("os.kill(os.getpid(), signal.SIGKILL)", 137)])
def test_the_cause_counts_not_what_it_leads_to(tmp_path, end, code):
    # Rank 0 sees the other end of a pipe close, as it would a peer's socket, and crashes at once.
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    program = f"""
if rank == 1:
    pipe = os.open(r'{pipe}', os.O_WRONLY)
    {end}
pipe = os.open(r'{pipe}', os.O_RDONLY)
os.read(pipe, 1)
os._exit(1)
"""
    assert [ranks(2, program) for _ in range(5)] == [code] * 5


def test_a_crash_outweighs_an_early_stop():
    assert ranks(2, "time.sleep(0.3 * rank); sys.exit(1 if rank == 1 else 75)") == 1


def test_a_rank_that_ignores_the_request_is_killed(monkeypatch):
    monkeypatch.setattr(launcher, "ECHO", 0.5)
    monkeypatch.setattr(launcher, "GRACE", 0.5)
    began = time.monotonic()
    program = """
if rank == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)
time.sleep(0.3)
sys.exit(4)
"""
    assert ranks(2, program) == 4
    assert time.monotonic() - began < 20


def test_a_killed_rank_is_named():
    end = outcome(2, "time.sleep(0.1)\nif rank == 1: os.kill(os.getpid(), signal.SIGKILL)")
    assert end == Outcome(137, "rank 1 was killed by SIGKILL (out of memory?)", unsaid=True)


def test_the_library_adds_nothing_to_what_ranks_say(capfd):
    assert ranks(2, "print(rank, end=' ', flush=True); time.sleep(60 * rank); sys.exit(3)") == 3
    said = capfd.readouterr()
    assert sorted(said.out.split()) == ["0", "1"] and said.err == ""


STOPS = """
def stop(number, frame):
    with open(f'{folder}/{rank}', 'a') as file: file.write('stop ')
    time.sleep(0.5)
    sys.exit(75)
signal.signal(wanted, stop)
pathlib.Path(folder, str(rank)).touch()
time.sleep(120)
"""


def ready(folder):
    return all((folder / str(rank)).exists() for rank in range(2))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_every_rank_once(tmp_path, number):
    process = started(f"folder, wanted = {str(tmp_path)!r}, signal.{number.name}\n{STOPS}")
    until(lambda: ready(tmp_path))
    os.killpg(process.pid, number)  # as Ctrl-C in a terminal does: to the whole group
    assert process.wait(120) == 75
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["stop ", "stop "]


def test_a_signal_while_ranks_are_being_started_reaches_all(tmp_path, monkeypatch):
    # The second rank is started only after the first one is up and the launcher has been sent its signal.
    made = SubprocessHandler.__init__

    def late(self, **arguments):
        if arguments["local_rank_id"] == 1:
            until((tmp_path / "0").exists)
            os.kill(os.getpid(), signal.SIGTERM)
        made(self, **arguments)

    monkeypatch.setattr(SubprocessHandler, "__init__", late)
    program = f"folder, wanted = {str(tmp_path)!r}, signal.SIGTERM\n{STOPS}"
    began = time.monotonic()
    end = outcome(2, program)
    assert time.monotonic() - began < launcher.PARTING / 2
    # Rank 1 is so young that it may have no handler yet.
    assert end.code in (75, 128 + signal.SIGTERM)
    assert (tmp_path / "0").read_text() == "stop "


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_ranks_that_do_not_listen_were_asked(tmp_path, number):
    program = f"pathlib.Path({str(tmp_path)!r}, str(rank)).touch(); time.sleep(120)"
    threading.Thread(target=lambda: (until(lambda: ready(tmp_path)), os.kill(os.getpid(), number))).start()
    assert outcome(2, program) == Outcome(128 + number, f"stopped by {number.name}", unsaid=True, asked=True)


def test_a_second_interrupt_ends_ranks_that_ignore_the_first(tmp_path):
    program = f"""
signal.signal(signal.SIGINT, signal.SIG_IGN)
pathlib.Path({str(tmp_path)!r}, str(rank)).touch()
time.sleep(120)
"""
    process = started(program)
    until(lambda: ready(tmp_path))
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(5 * launcher.PERIOD)
    assert process.wait(120) == 128 + signal.SIGTERM


def test_what_nohup_switched_off_stays_off(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        program = "os.kill(os.getppid(), signal.SIGHUP); time.sleep(0.3)"
        assert ranks(1, program + "; sys.exit(signal.getsignal(signal.SIGHUP) != signal.SIG_IGN)") == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_terminal_does_not_signal_ranks_behind_our_back():
    assert ranks(2, "sys.exit(os.getsid(0) != os.getpid())") == 0


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_ranks_do_not_outlive_a_killed_launcher(tmp_path):
    program = f"""
from dsplugins.rank import end_with_launcher
end_with_launcher()
pathlib.Path(r'{tmp_path}', str(rank)).write_text(f'{{os.getpid()}} ')
time.sleep(60)
"""
    process = started(program)
    files = [tmp_path / str(rank) for rank in range(2)]
    until(lambda: all(file.exists() and file.read_text().endswith(" ") for file in files))
    process.kill()
    process.wait()
    until(lambda: all(ended(int(file.read_text())) for file in files))


def test_handlers_are_put_back():
    ours = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    before = [signal.getsignal(number) for number in ours]
    ranks(1, "")
    assert [signal.getsignal(number) for number in ours] == before


def test_the_port_is_one_that_the_system_gives_nobody(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        there = taken.getsockname()[1]
        monkeypatch.setattr(launcher, "OWN_PORTS", [there] * 100)
        assert launcher._free_port() != there
    monkeypatch.undo()
    found = {launcher._free_port() for _ in range(20)}
    assert len(found) > 10 and all(port in launcher.OWN_PORTS and port < 32_768 for port in found)


def test_ranks_know_each_other(tmp_path):
    program = (
        "e = os.environ; "
        f"pathlib.Path(r'{tmp_path}', e['RANK']).write_text(e['WORLD_SIZE'] + ' ' + e['MASTER_PORT'])"
    )
    assert ranks(3, program) == 0
    said = {(tmp_path / str(rank)).read_text() for rank in range(3)}
    assert len(said) == 1 and said.pop().startswith("3 ")


@pytest.mark.parametrize(("given", "wanted"), [(None, "3"), ("5", "5")])
def test_cores_are_shared_unless_told_otherwise(tmp_path, monkeypatch, given, wanted):
    monkeypatch.setattr(launcher, "_cores", lambda: 7)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    program = f"pathlib.Path(r'{tmp_path}', str(rank)).write_text(os.environ['OMP_NUM_THREADS'])"
    assert ranks(2, program) == 0
    assert (tmp_path / "1").read_text() == wanted


def test_a_rank_knows_that_it_is_one(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert not inside_torchrun()
    assert ranks(1, "from dsplugins.rank import inside_torchrun; sys.exit(not inside_torchrun())") == 0
