"""Where a run's numbers go: metrics.jsonl, TensorBoard and the terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

from jaxlin import processes


class MetricsLog:
    """Appends to metrics.jsonl and TensorBoard; what is there from after `step` (a killed run's) is dropped.

    Of several processes the first writes.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self._writes = processes.is_first()
        if not self._writes:
            return
        self._path = folder / "metrics.jsonl"
        if self._path.exists():
            lines = self._path.read_text().splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
            self._path.write_text("".join(kept))
        self._file = self._path.open("a", buffering=1)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, stage: int, values: dict[str, Any]) -> None:
        """One line of numbers and lists of numbers, at the run's step `step`."""
        if not self._writes:
            return
        self._file.write(json.dumps({"step": step, "stage": stage, **values}) + "\n")
        for name, value in values.items():
            items = enumerate(value) if isinstance(value, list) else [(None, value)]
            for i, v in items:
                tag = f"stage{stage}/{name}" if i is None else f"stage{stage}/{name}/{i:02d}"
                self._board.add_scalar(tag, v, step)

    def close(self) -> None:
        """Write out what is buffered."""
        if self._writes:
            self._file.close()
            self._board.close()


def progress_bar(console: Console) -> Progress:
    """Steps done, time left, and a field `numbers` for loss and speed."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[numbers]}"),
        console=console,
        disable=console.quiet or not console.is_terminal,
    )
