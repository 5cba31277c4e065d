"""The student that is looked into, and the text that it reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlin.command_line import is_exported
from jaxlin.config import DataConfig, ModelConfig, RunConfig, UserError
from jaxlin.evaluation.subject import params_sha256
from jaxlin.export import open_student
from jaxlin.runs import open_run
from jaxlin.session import serving_params
from jaxlin.training_data import heldout_of_last_stage


@dataclass(frozen=True)
class Subject:
    """A student, as it is served, and where its text comes from."""

    config: ModelConfig
    params: Any
    tokenizer: Any
    run: RunConfig
    folder: Path
    settings: dict[str, Any]
    """Those that it was trained with."""
    params_sha256: str
    """As evaluations tell it, of the parameters as they are kept."""
    other_text: tuple[str, ...] = ()
    """What was given in place of the run's held-out text."""

    def stream(self, count: int, least: int) -> tuple[np.ndarray, str]:
        """Held-out tokens in their order, `count` of them or as many as there are; and which text that is.

        Where fewer than `least` were held back, every other document of the whole text: the run was trained on those.
        """
        data = replace(self.run.data, eval_tokens=count + self.run.data.seq_len)
        held_out = self._tokens(data)
        if len(held_out) >= least or data.heldout or self.run.conversations:
            return held_out[:count], ", ".join(self.other_text) or "held out"
        return self._tokens(replace(data, heldout_fraction=0.5))[:count], "trained on"

    def _tokens(self, data: DataConfig) -> np.ndarray:
        batches = heldout_of_last_stage(replace(self.run, data=data), self.folder, self.tokenizer)
        return np.concatenate([batch["tokens"][batch["segment_ids"] != 0] for batch in batches])


def open_subject(folder: str, text: Sequence[str] = ()) -> Subject:
    """The student of a run folder or an exported folder; `text` replaces the run's held-out text.

    Raises UserError where there is none, where all its layers are softmax attention, and where an exported folder comes
    without `text`.
    """
    exported = is_exported(folder)
    if exported and not text:
        raise UserError(f"--run {folder}: an exported student, which has no text with it; give --text")
    student = open_student(folder)
    if set(student.config.mixer) == {"softmax"}:
        raise UserError(f"--run {folder}: all its layers are softmax attention, which has no state; nothing to show")
    run = RunConfig() if exported else open_run(folder).config
    if text:
        run = replace(run, conversations=(), epochs=None, data=replace(run.data, heldout=tuple(text)))
    params = jax.tree.map(jnp.asarray, serving_params(student.params, student.config))
    settings, sha256 = student.card["settings"], params_sha256(student.params)
    return Subject(student.config, params, student.tokenizer, run, Path(folder), settings, sha256, tuple(text))
