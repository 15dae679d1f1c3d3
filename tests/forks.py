"""`python -m dsplugins ...` without the start of an interpreter: forks of one that has imported core.

That import takes five seconds of a core, and a run of two ranks is three processes. Here all of them are
forks: of the process that `dsplugins.testing` forks its workers from, and then of each other, where the
launcher or torchrun starts ranks with `subprocess`. Otherwise they are what they always are: processes of
their own, with parents, sessions, signals and exit codes. Real interpreters start in the tests of `launch/`,
of the pages of `docs/`, and of what happens at an interpreter's start.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from dsplugins.testing.pool import context


class Fork:
    """A command that runs, with the methods of `subprocess.Popen`; what it prints goes to files."""

    def __init__(
        self,
        line: Sequence[str | Path],
        cwd: str | Path | None = None,
        env: Mapping[str, str] | None = None,
        together: bool = True,
        input: str = "",
        session: bool = False,
    ) -> None:
        """`line` is `[sys.executable, ...]`. `together`: standard error goes where standard output does.
        `session`: it leads one of its own, and hears Ctrl-C wherever a shell has put the tests.
        """
        program, *arguments = map(str, line)
        assert program == sys.executable, f"{program} is no fork of this interpreter"
        self._folder, self._together = tempfile.TemporaryDirectory(), together
        names = ("in", "out", "out" if together else "err")
        self._files = [Path(self._folder.name, name) for name in names]
        self._files[0].write_text(input)
        given = (arguments, os.fspath(cwd or os.getcwd()), dict(env or os.environ), _bare_path())
        made = {"target": _first, "args": (session, list(map(str, self._files)), *given), "daemon": True}
        self._process = context().Process(**made)
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """Its exit code, or None; negative for a signal."""
        return self._process.exitcode

    @property
    def returncode(self) -> int | None:
        """The same."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code. Kills it and raises TimeoutExpired after `timeout` seconds."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self.kill()
            raise subprocess.TimeoutExpired("the command", timeout or 0.0, "".join(self._printed()))
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it printed, when it has ended."""
        self.wait(timeout)
        out, err = self._printed()
        return out, "" if self._together else err

    def send_signal(self, number: int) -> None:
        """To this process alone."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """And wait for its end."""
        self._process.kill()
        self._process.join()

    def _printed(self) -> list[str]:
        return [file.read_text(errors="replace") for file in self._files[1:]]


def run(
    line: Sequence[str | Path],
    cwd: str | Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 300.0,
    input: str = "",
) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run` with `capture_output` and `text`."""
    started = Fork(line, cwd, env, together=False, input=input)
    out, err = started.communicate(timeout)
    return subprocess.CompletedProcess(line, started.wait(), out, err)


@functools.cache
def _bare_path() -> list[str]:
    """`sys.path` of a new interpreter, without PYTHONPATH and the folder of a script."""
    line = [sys.executable, "-c", "import json, sys; print(json.dumps(sys.path[1:]))"]
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return json.loads(subprocess.run(line, env=bare, capture_output=True, text=True, check=True).stdout)


# -- in the fork ----------------------------------------------------------------------------------


def _first(
    session: bool, files: list[str], arguments: list[str], cwd: str, env: dict[str, str], path: list[str]
) -> NoReturn:
    """The process that a test starts: from here on `subprocess` forks."""
    if session:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for descriptor, file in enumerate(files):
        opened = os.open(file, os.O_RDWR | os.O_CREAT | (os.O_APPEND if descriptor else 0))
        os.dup2(opened, descriptor)
        os.close(opened)
    multiprocessing.current_process()._config["daemon"] = False  # it may have processes of its own
    if sys.platform == "linux":
        real = subprocess.Popen._execute_child
        subprocess.Popen._execute_child = functools.partialmethod(_execute_child, real, path)
    _become(arguments, cwd, env, path)


def _execute_child(self: Any, real: Any, path: list[str], args: Any, *rest: Any) -> None:
    """`Popen._execute_child`, where this interpreter is started without anything out of the ordinary."""
    executable, preexec, close, passed, cwd, env, _, _, shell = rest[:9]
    from_parent, to_child, to_parent, from_child, error, to_error = rest[9:15]
    words = [] if isinstance(args, str | bytes) else list(map(os.fspath, args))
    if shell or executable or preexec or passed or not words or words[0] != sys.executable:
        return real(self, args, *rest)
    new_session = rest[20]
    sys.stdout.flush()
    sys.stderr.flush()
    self.pid = os.fork()
    if self.pid:
        self._child_created = True
        self._close_pipe_fds(from_parent, to_child, to_parent, from_child, error, to_error)
        return None
    try:
        if new_session:
            os.setsid()
        for descriptor, given in enumerate((from_parent, from_child, to_error)):
            if given not in (-1, descriptor):
                os.dup2(given, descriptor)
        os.closerange(3, 1 << 16)
        _default_signals()
        _become(words[1:], cwd or os.getcwd(), dict(env if env is not None else os.environ), path)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def _default_signals() -> None:
    """As after exec: what was ignored stays so, what had a handler has none."""
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def _become(arguments: list[str], cwd: str, env: dict[str, str], path: list[str]) -> NoReturn:
    """Be the interpreter with these arguments."""
    atexit._clear()  # what the parent does at its end: it removes its temporary folders, for example
    weakref.finalize._registry.clear()  # type: ignore[attr-defined]
    weakref.finalize._registered_with_atexit = False  # type: ignore[attr-defined]
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for descriptor, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        stream = os.fdopen(descriptor, mode, buffering=-1 if descriptor < 2 else 1, closefd=False)
        setattr(sys, name, stream)
    added = [os.path.abspath(entry) for entry in env.get("PYTHONPATH", "").split(os.pathsep) if entry]
    _forget_modules(path)
    sys.path[:] = [*added, *path]
    sys.path_importer_cache.clear()
    importlib.invalidate_caches()
    gc.freeze()
    with suppress(ImportError):
        sys.modules.pop("sitecustomize", None)
        importlib.import_module("sitecustomize")
    _leave(_code(arguments))


def _forget_modules(path: list[str]) -> None:
    """Those from PYTHONPATH and the like, a launcher's plugins: each process imports them for itself."""
    own = tuple(path)
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file and not file.startswith(own) and name.partition(".")[0] not in ("dsplugins", "__main__"):
            del sys.modules[name]


def _code(arguments: list[str]) -> int:
    """Of what is run: as an interpreter ends with it."""
    try:
        _run(arguments)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return -signal.SIGINT
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _run(arguments: list[str]) -> None:
    first, *rest = arguments[arguments[0] == "-u" :]  # torchrun's, for output that comes at once
    if first == "-m":
        sys.argv, sys.path[:0] = rest, [os.getcwd()]
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv, sys.path[:0] = ["-c", *rest[1:]], [""]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        assert not first.startswith("-"), f"no fork knows the option {first}"
        sys.argv, sys.path[:0] = [first, *rest], [os.path.dirname(os.path.abspath(first))]
        runpy.run_path(first, run_name="__main__")


def _leave(code: int) -> NoReturn:
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
        time.sleep(60)
    os._exit(code)
