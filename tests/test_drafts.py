"""Files that several processes write."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import time

import pytest

from jaxlin.drafts import AGE, draft

TIMES, LENGTH = 200, 20_000


def write(path, letter, start):
    start.wait()
    for _ in range(TIMES):
        with draft(path) as part:
            part.write_text(json.dumps(letter * LENGTH))


def test_several_writers(tmp_path):
    """Whoever reads meanwhile finds one writer's text, whole."""
    path, context = tmp_path / "result.json", multiprocessing.get_context("spawn")
    path.write_text(json.dumps("a" * LENGTH))
    start = context.Barrier(3)
    writers = [context.Process(target=write, args=(path, letter, start)) for letter in "ab"]
    for writer in writers:
        writer.start()
    start.wait()
    while any(writer.is_alive() for writer in writers):
        assert json.loads(path.read_text()) in ("a" * LENGTH, "b" * LENGTH)
    assert [writer.exitcode for writer in writers] == [0, 0] and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_nothing_half_written(tmp_path, error):
    path = tmp_path / "result.json"
    path.write_text("before")
    with pytest.raises(error), draft(path) as part:
        part.write_text("ha")
        raise error
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def leave_half(path):
    with draft(path) as part:
        part.write_text("ha")
        os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_process_left_goes(tmp_path):
    """After an hour, with the next draft of the same file; those of processes that run, other hosts and files stay."""
    path, context = tmp_path / "result.json", multiprocessing.get_context("spawn")
    killed = context.Process(target=leave_half, args=(path,))
    killed.start()
    killed.join()
    host = socket.gethostname()
    stay = [f"result.json.{host}.{os.getppid()}.part", "result.json.elsewhere.1.part", f"other.json.{host}.x.part"]
    for name in stay:
        (tmp_path / name).touch()
    (tmp_path / f"result.json.{host}.x.part").mkdir()
    (left,) = tmp_path.glob(f"result.json.{host}.{killed.pid}.part")
    for age in (0, 2 * AGE):
        for file in tmp_path.iterdir():
            os.utime(file, times=(time.time() - age,) * 2)
        with draft(path) as part:
            part.write_text("whole")
        assert left.exists() == (age == 0)
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"result.json", f"result.json.{host}.x.part", *stay}
