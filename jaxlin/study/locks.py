"""Who is at work on a run: a file beside its folder, created in one instant: two jobs never take the same run."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from jaxlin.drafts import draft, process_runs, process_status


@dataclass(frozen=True)
class Owner:
    """A process, by what no other one has: on one host a process number comes again, with another start."""

    host: str
    pid: int
    started: str

    @classmethod
    def of(cls, pid: int) -> Owner:
        """The process `pid` of this host."""
        return cls(socket.gethostname(), pid, _started(pid))

    def is_gone(self) -> bool:
        """Whether it certainly no longer runs; of another host nothing is certain."""
        return self.host == socket.gethostname() and (self.started != _started(self.pid) or not process_runs(self.pid))

    def __str__(self) -> str:
        return f"process {self.pid} of {self.host}"


def _started(pid: int) -> str:
    """The start of a process in the kernel's clock ticks, and the boot that they count from; empty without /proc."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {process_status(pid)[19]}"
    except OSError:
        return ""


class Lock:
    """A run that this process works on, with its commands, until `release`."""

    def __init__(self, path: Path, owners: list[Owner]) -> None:
        self.path, self._owners = path, owners

    def share(self, pid: int) -> None:
        """A command of ours works on it too, and may outlive us."""
        self._owners = [self._owners[0], Owner.of(pid)]
        _replace(self.path, self._owners)

    def release(self) -> None:
        """Let others take the run."""
        self.path.unlink(missing_ok=True)


def take(path: Path) -> Lock | str:
    """The lock at `path`, or one line that says who has it and what to do.

    What processes of this host left that are gone is taken over.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    owners = [Owner.of(os.getpid())]
    with _alone(path.parent):
        if path.exists():
            holders = _read(path)
            if holders and all(holder.is_gone() for holder in holders):
                path.unlink()
        try:
            _create(path, owners)
        except FileExistsError:
            who = next((str(h) for h in _read(path) if not h.is_gone()), "a process that left no name")
            return f"{path}: {who} works on this run; delete the file only if that process is gone"
    return Lock(path, owners)


def _create(path: Path, owners: list[Owner]) -> None:
    """Write a new file. Raises FileExistsError."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644), "w") as file:
        file.write(_text(owners))


def _replace(path: Path, owners: list[Owner]) -> None:
    with draft(path) as part:
        part.write_text(_text(owners))


def _text(owners: list[Owner]) -> str:
    return json.dumps([asdict(owner) for owner in owners])


def _read(path: Path) -> list[Owner]:
    """Who holds the lock; nobody where it was just given back."""
    try:
        return [Owner(**owner) for owner in json.loads(path.read_text())]
    except (OSError, ValueError, TypeError):
        return []


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process of this host at a time: two must not both take over what a third left."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some shared file systems have no such locks; creation is atomic anyway
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
