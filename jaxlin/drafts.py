"""Files that are there whole or not at all, though several processes write the same one."""

from __future__ import annotations

import contextlib
import glob
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

AGE = 3600.0  # seconds since a draft was written to, before anybody else may remove it: containers share names of hosts


@contextlib.contextmanager
def draft(path: Path) -> Iterator[Path]:
    """A file to write, this process's own, which becomes `path` at the end; on an error nothing is left of it.

    What processes of this host that were killed left of the same file is removed.
    """
    ours = f"{path.name}.{socket.gethostname()}."
    part = path.with_name(f"{ours}{os.getpid()}.part")
    for left in path.parent.glob(f"{glob.escape(ours)}*.part"):
        with contextlib.suppress(OSError):  # what cannot be removed is in nobody's way
            if time.time() - left.stat().st_mtime > AGE and not _runs(left.name[len(ours) :].removesuffix(".part")):
                left.unlink()
    try:
        yield part
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def _runs(pid: str) -> bool:
    """Whether there is such a process on this host; who cannot tell says yes."""
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (ValueError, OverflowError, PermissionError):
        pass
    return True
