"""What an evaluation measures: a run's student beside its teacher, or a teacher alone."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from jaxlin import generate, processes
from jaxlin.command_line import one_of
from jaxlin.config import RunConfig
from jaxlin.distill import Batch
from jaxlin.evaluation.language_modeling import batch_sums, on_mesh
from jaxlin.runs import Run, Teacher, load_teacher, milestone_folder, open_run
from jaxlin.sharding import param_shardings
from jaxlin.student import abstract_params
from jaxlin.training_data import heldout_of_last_stage


@dataclass(frozen=True)
class Subject:
    """The models, by name ("teacher", and "student" where there is a run), and the text to measure them on."""

    models: dict[str, Teacher]
    config: RunConfig
    run: Run | None = None
    mesh: jax.sharding.Mesh | None = None
    """What the parameters are spread over; None where they are on one device."""
    step: int | None = None
    """Of the milestone that the student is from; None for the newest checkpoint."""
    other_text: bool = False
    """Whether the held-out text is not the run's own."""

    @property
    def measured(self) -> Teacher:
        """The model that the evaluation is about: the student, or a teacher without one."""
        return self.models["student" if "student" in self.models else "teacher"]

    def at(self, step: int) -> Subject:
        """The same with the student of another checkpoint."""
        assert self.run is not None
        student = replace(self.models["student"], params=_place(self.run, self.mesh, step))
        return replace(self, models={**self.models, "student": student}, step=step)

    @property
    def folder(self) -> Path:
        """Where what was measured of the run is kept."""
        assert self.run is not None
        return self.run.folder if self.step is None else milestone_folder(self.run.folder, self.step)

    def student_only(self) -> Subject:
        """The same without the teacher."""
        return replace(self, models={"student": self.models["student"]})

    @functools.cached_property
    def batches(self) -> Sequence[Batch]:
        """Held-out text or conversations: what the run measured its last stage on, unless a text was asked for."""
        folder = self.run.folder if self.run else Path()
        return heldout_of_last_stage(self.config, folder, self.models["teacher"].tokenizer)

    @functools.cached_property
    def held_out_sums(self) -> list[dict[str, float]]:
        """The student beside its teacher on each of `batches`, see `batch_sums`."""
        teacher, student = self.models["teacher"], self.models["student"]
        return batch_sums(teacher.config, teacher.params, student.config, student.params, self.batches, mesh=self.mesh)


def open_subject(
    run: str = "", teacher: str = "", text: Sequence[str] = (), *, mesh: jax.sharding.Mesh | None = None
) -> Subject:
    """Load what `run` (a folder) or `teacher` names, over `mesh`; `text` replaces the run's held-out text.

    Raises UserError where neither or both are given, or they cannot be loaded.
    """
    one_of(run, teacher)
    opened = open_run(run) if run else None
    config = opened.config if opened else RunConfig(teacher=teacher)
    if text:
        config = replace(config, conversations=(), epochs=None, data=replace(config.data, heldout=tuple(text)))
    mesh = mesh if mesh is not None and mesh.size > 1 else None
    params = _place(opened, mesh) if opened else None  # first: a bad checkpoint fails at once
    models = {"teacher": load_teacher(config, mesh)}
    if opened:
        models["student"] = Teacher(opened.student, params, models["teacher"].tokenizer)
    return Subject(models, config, opened, mesh, other_text=bool(text))


def _place(run: Run, mesh: jax.sharding.Mesh | None, step: int | None = None) -> Any:
    """The student's parameters on their devices."""
    params = run.params(step)
    if mesh is None:
        return jax.tree.map(jnp.asarray, params)
    homes = param_shardings(abstract_params(run.student), mesh)
    return jax.tree.map(lambda a, home: jax.make_array_from_callback(a.shape, home, a.__getitem__), params, homes)


def answerer(model: Teacher, max_new_tokens: int, mesh: jax.sharding.Mesh | None = None) -> Any:
    """A function from prompts to greedy continuations, as token ids."""

    def answer(prompts: list[list[int]]) -> list[list[int]]:
        stop = generate.stop_tokens(model.tokenizer)
        with on_mesh(mesh):
            return generate.generate(model.config, model.params, prompts, max_new_tokens=max_new_tokens, stop_ids=stop)

    return answer


def params_sha256(params: Any) -> str:
    """SHA-256 over the parameters: path and raw bytes of each, in the order of their paths."""
    digest = hashlib.sha256()
    for path, value in sorted(flatten_dict(params, sep="/").items()):
        digest.update(path.encode())
        digest.update(np.ascontiguousarray(processes.whole(value)).tobytes())
    return digest.hexdigest()
