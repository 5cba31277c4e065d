"""Files that are there whole or not at all, though several processes write the same one."""

from __future__ import annotations

import contextlib
import glob
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

ENDED = ("Z", "X")  # zombies and the dead, as the kernel calls them
AGE = 3600.0  # seconds since a draft was written to, before anybody else may remove it: containers share names of hosts


@contextlib.contextmanager
def draft(path: Path) -> Iterator[Path]:
    """A file to write, this process's own, which becomes `path` at the end; on an error nothing is left of it.

    What processes of this host that were killed left of the same file is removed.
    """
    ours = f"{path.name}.{socket.gethostname()}."
    part = path.with_name(f"{ours}{os.getpid()}.part")
    for left in path.parent.glob(f"{glob.escape(ours)}*.part"):
        with contextlib.suppress(OSError, ValueError, OverflowError):  # what cannot be removed is in nobody's way
            pid = int(left.name[len(ours) :].removesuffix(".part"))
            if time.time() - left.stat().st_mtime > AGE and not process_runs(pid):
                left.unlink()
    try:
        yield part
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def process_status(pid: int) -> list[str]:
    """What the kernel says of a process, from its state on. Raises OSError where there is none, or no /proc."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def process_runs(pid: int) -> bool:
    """Whether a process of this host runs; one that has ended, and that nobody asked about (containers' first processes
    may not), does not."""
    with contextlib.suppress(OSError):
        if process_status(pid)[0] in ENDED:
            return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
