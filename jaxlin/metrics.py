"""Where a run's numbers go: metrics.jsonl, TensorBoard, Weights & Biases and the terminal."""

from __future__ import annotations

import importlib.util
import json
import uuid
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

from jaxlin import processes
from jaxlin.command_line import to_json
from jaxlin.config import RunConfig, UserError


class MetricsLog:
    """Appends to metrics.jsonl and TensorBoard, where what a killed run wrote after `step` is dropped, and to W&B.

    Of several processes the first writes. Raises UserError where W&B cannot be reached.
    """

    def __init__(self, run: RunConfig, step: int) -> None:
        self._writes = processes.is_first()
        if not self._writes:
            return
        self._wandb = _start_wandb(run) if run.wandb else None
        self._path = run.folder / "metrics.jsonl"
        if self._path.exists():
            lines = self._path.read_text().splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
            self._path.write_text("".join(kept))
        self._file = self._path.open("a", buffering=1)
        self._board = SummaryWriter(str(run.folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, stage: int, values: dict[str, Any]) -> None:
        """One line of numbers and lists of numbers, at the run's step `step`."""
        if not self._writes:
            return
        self._file.write(json.dumps({"step": step, "stage": stage, **values}) + "\n")
        scalars = {}
        for name, value in values.items():
            items = enumerate(value) if isinstance(value, list) else [(None, value)]
            for i, v in items:
                scalars[f"stage{stage}/{name}" if i is None else f"stage{stage}/{name}/{i:02d}"] = v
        for tag, v in scalars.items():
            self._board.add_scalar(tag, v, step)
        if self._wandb is not None:
            self._wandb.log({"step": step, **scalars})

    def close(self) -> None:
        """Write out what is buffered."""
        if self._writes:
            self._file.close()
            self._board.close()
            if self._wandb is not None:
                self._wandb.finish()


def require_wandb(project: str) -> None:
    """Raise UserError where metrics are to go to a W&B project and its package is not there."""
    if project and importlib.util.find_spec("wandb") is None:
        raise UserError(f"--wandb {project}: the package is not installed; pip install wandb, or leave the flag out")


def _start_wandb(run: RunConfig) -> Any:
    """The W&B run of a run folder, which keeps its id: training that resumes goes on in it."""
    import wandb  # pyright: ignore[reportMissingImports] -- optional

    identity = run.folder / "wandb_id"
    if not identity.exists():
        identity.write_text(uuid.uuid4().hex[:8])
    entity, _, project = run.wandb.rpartition("/")
    try:
        started = wandb.init(
            entity=entity or None, project=project, name=run.folder.name, id=identity.read_text(), resume="allow",
            dir=run.folder, config=json.loads(to_json(run)), reinit="create_new",
            settings=wandb.Settings(console="off"),
        )  # fmt: skip
    except wandb.errors.Error as error:
        raise UserError(
            f"--wandb {run.wandb}: {str(error).splitlines()[0]}; set WANDB_MODE=offline, or leave the flag out"
        ) from error
    # Not W&B's own step, which only grows: after a kill, steps come again.
    started.define_metric("*", step_metric="step")
    return started


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
