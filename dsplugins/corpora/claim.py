"""One build of a corpus at a time: while it lasts, `PREFIX.building` says who is at work.

Only one process can create that file, on NFS and Lustre and from several machines, too, where locks often
hold nobody. A process that was killed leaves it. The machine that knows so takes it over, under a lock that
needs to hold on that machine alone; another one can't know, and a person removes it.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TextIO

from dsplugins.contracts import EnvironmentUnfit


class Occupied(EnvironmentUnfit):
    """Another build is at work on this corpus, or can't be told from one that is."""


def _machine() -> str:
    """What counts process ids: a kernel since it was started, and a container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _began(pid: int) -> str:
    """When a process began, in ticks; empty where nobody tells, `ended` of one that nobody has waited for."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "ended" if state == "Z" else fields[18]


@dataclass(frozen=True)
class Owner:
    """A process that builds, as the file has it."""

    host: str
    pid: int
    since: str
    machine: str
    began: str
    """An id is given again; not at the same moment."""
    token: str
    """Names the temporary files of this build."""

    @classmethod
    def here(cls) -> Owner:
        """This process."""
        host, pid = socket.gethostname(), os.getpid()
        since = datetime.now().astimezone().isoformat(timespec="seconds")
        return cls(host, pid, since, _machine(), _began(pid), secrets.token_hex(4))

    def __str__(self) -> str:
        return f"process {self.pid} of {self.host}, since {self.since}"

    def ended(self) -> bool:
        """Whether it is known to have ended."""
        if self.machine != _machine():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass  # somebody else's
        now = _began(self.pid)
        return bool(now) and now != self.began


@dataclass(frozen=True)
class Claim:
    """On a corpus."""

    out: Path
    owner: Owner = field(default_factory=Owner.here)

    @property
    def path(self) -> Path:
        """The file."""
        return self.out.with_name(f"{self.out.name}.building")

    def take(self, tell: Callable[[str], None]) -> None:
        """Create the file, or take over one whose process has ended, and tell so. Raises Occupied."""
        while not self._created():
            with suppress(FileNotFoundError):  # whose it was has just finished
                if self._taken_over(tell):
                    return

    def keep(self) -> None:
        """Raise Occupied where the file was taken away meanwhile."""
        if not self._mine():
            raise Occupied(
                f"{self.path}, which kept other builds away from {self.out}, is gone or another one's: "
                "nothing was written; build it again when no other build is under way"
            )

    def leave(self) -> None:
        """Remove the file, if it is this one's."""
        if self._mine():
            self.path.unlink(missing_ok=True)

    def _mine(self) -> bool:
        try:
            return self.path.read_text() == self._text
        except FileNotFoundError:
            return False

    @property
    def _text(self) -> str:
        return json.dumps(asdict(self.owner)) + "\n"

    def _created(self) -> bool:
        try:
            file = self.path.open("x")
        except FileExistsError:
            return False
        try:
            with file:
                _written(file, self._text)
        except BaseException:
            self.path.unlink(missing_ok=True)
            raise
        return True

    def _taken_over(self, tell: Callable[[str], None]) -> bool:
        """False where it has changed hands meanwhile."""
        text = self.path.read_text()
        owner = self._refuse_working(text)
        try:
            with self.path.open("r+") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                # Its process has ended, and removes it no more: what has this name now, keeps it.
                if file.read() != text or not os.path.samestat(os.fstat(file.fileno()), self.path.stat()):
                    return False
                file.seek(0)
                file.truncate()
                _written(file, self._text)
        except FileNotFoundError:
            raise
        except OSError as error:
            said = f"{self.path} was left by {owner}, which has ended, and can't be taken over"
            raise Occupied(f"{said} ({error.strerror}): remove it") from error
        tell(f"{self.path} was left by {owner}, which has ended: taken over")
        return True

    def _refuse_working(self, text: str) -> Owner:
        """The owner, if it has ended."""
        try:
            owner = Owner(**json.loads(text))
        except (ValueError, TypeError):
            raise Occupied(
                f"{self.path} doesn't say whose it is: another build of {self.out} has begun at this moment, "
                "or was cut off when it did. Try again, and remove that file if this is said again"
            ) from None
        if owner.ended():
            return owner
        said = f"another build of {self.out} is under way, by {owner}: wait for it, or choose another --out"
        if owner.machine != _machine():
            said += f". Whether it has ended can't be seen from here: if it has, remove {self.path}"
        raise Occupied(said)


def _written(file: TextIO, text: str) -> None:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())


@contextmanager
def claimed(out: Path, tell: Callable[[str], None]) -> Iterator[Claim]:
    """Nobody else builds this corpus meanwhile. Raises Occupied while somebody does."""
    claim = Claim(out)
    try:
        claim.take(tell)
        yield claim
    finally:
        claim.leave()


__all__ = ["Claim", "Occupied", "Owner", "claimed"]
