"""Files that several processes write."""

from __future__ import annotations

import json
import multiprocessing

import pytest

from jaxlin.drafts import draft

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
