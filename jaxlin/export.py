"""`python -m jaxlin.export`: a run's student as a Hugging Face folder, for transformers, FLA and jaxlin itself."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from jaxlin import convert, hf_config, hf_files, hf_fla, hf_student, hf_writer, model_card
from jaxlin.checkpoint import Checkpoints
from jaxlin.command_line import RUN_CARD, is_exported, parse, run_main, to_json
from jaxlin.config import ModelConfig, UserError
from jaxlin.evaluation.report import SUITES, examples_of, without_times
from jaxlin.evaluation.subject import params_sha256
from jaxlin.generate import stop_tokens
from jaxlin.hf_table import table
from jaxlin.runs import Run, open_run, without_local_paths

CARD_KEYS = ("card", "settings", "step", "stages", "losses", "evaluation")


@dataclass(frozen=True)
class Settings:
    """Write a student as a Hugging Face folder."""

    run: str
    """Run folder; or a folder that was exported, to write it again."""
    out: str
    """Folder to make; it appears when it is complete."""
    format: Literal["jaxlin", "fla"] = "jaxlin"
    """Whose classes load it: jaxlin's, which come with the folder, or flash-linear-attention's, where they compute the
    same."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """What parameters are stored in; by default what they are."""
    push: str = ""
    """Repository on the Hugging Face hub, ORGANISATION/NAME, to upload the folder to."""


@dataclass(frozen=True)
class Student:
    """What is exported."""

    config: ModelConfig
    params: Any
    tokenizer: Any
    card: dict[str, Any]
    """What the model card tells; see `run_card`."""


def open_student(folder: str | Path) -> Student:
    """The student of a run folder, at its newest checkpoint, or of an exported folder; parameters are on the host.

    Raises UserError where there is none, or it is damaged.
    """
    folder = Path(folder)
    if is_exported(folder):
        card = hf_files.read_json(folder / RUN_CARD)
        if lost := [key for key in CARD_KEYS if key not in card]:
            raise UserError(f"{folder / RUN_CARD} has no {lost[0]}: it is damaged, or another version wrote it")
        return Student(*convert.load_teacher(str(folder)), card)
    run = open_run(folder)
    step = Checkpoints(run.folder / "checkpoints", keep=1).newest()
    params = run.params(step)
    return Student(run.student, params, run.tokenizer(), run_card(run, step, params))


def run_card(run: Run, step: int | None, params: Any) -> dict[str, Any]:
    """What was run and measured: card, settings, step, stages, losses, evaluation ({task: {model: {metric: value}}}),
    examples ({task: of how many}).

    Evaluations of other parameters than these are left out, and times. Of local paths the last part is kept.
    """
    found = [run.read("evaluation.json"), *(run.read(f"evaluation/{suite}.json") for suite in SUITES)]
    sha256 = params_sha256(params)
    evaluation: dict[str, Any] = {}
    examples: dict[str, int] = {}
    for measured in filter(None, found):
        if measured.get("params_sha256") == sha256:
            results = without_times(measured)["results"]
            evaluation |= results
            examples |= {task: n for task in results if (n := examples_of(measured, task))}
    stages = {str(n): {"tokens": s.tokens, "lr": s.lr, "lr_new": s.lr_new} for n, s in run.stages().items()}
    card = {
        "card": run.read("card.json") or {},
        "settings": json.loads(to_json(run.config)),
        "step": step,
        "stages": stages,
        "losses": run.stage_losses(),
        "evaluation": evaluation,
        "examples": examples,
    }
    return without_local_paths(card)


def export(
    student: Student, out: str | Path, *, format: str = "jaxlin", dtype: str | None = None,
    shard_bytes: int = hf_writer.SHARD_BYTES,
) -> None:  # fmt: skip
    """Write a student as a folder: tensors, configurations, tokenizer, model card, run card, and the model's code.

    A student whose mixer is softmax alone becomes a Llama, Qwen2 or Qwen3. The folder appears only when complete.

    Args:
        student: the model; each parameter addressable by this process.
        out: the folder to make.
        format: "jaxlin", or "fla" for flash-linear-attention's classes.
        dtype: of the tensors; None keeps that of the parameters, float32 where they differ.
        shard_bytes: the largest weights file.

    Raises:
        UserError: `out` exists already, or FLA has no class for the student, or the model's code not its mixer.
        ValueError: the student's card is not whole.
    """
    config, folder = student.config, Path(out)
    kind = "softmax" if config.mixer == ("softmax",) else format
    if format == "fla":
        hf_fla.check(config)
    if kind == "jaxlin":
        hf_student.check_code(config)
    if lost := [key for key in CARD_KEYS if key not in student.card]:
        raise ValueError(f"the student's card lacks {lost[0]}: see run_card, which makes one of a run folder")
    entries = hf_fla.fla_table(config) if kind == "fla" else table(config)
    convert.check_params(student.params, entries)
    dtype = dtype or _common_dtype(student.params)
    to_hf = {"softmax": hf_config.config_to_hf, "jaxlin": hf_student.config_to_hf, "fla": hf_fla.config_to_hf}[kind]
    with hf_writer.new_folder(folder) as temporary:
        hf_writer.write_tensors(student.params, entries, temporary, dtype=dtype, shard_bytes=shard_bytes)
        tokens = hf_writer.write_tokenizer(student.tokenizer, temporary)
        hf_writer.write_json(temporary / "config.json", to_hf(config, dtype) | tokens)
        stop = {**tokens, "eos_token_id": list(stop_tokens(student.tokenizer))}
        hf_writer.write_json(temporary / "generation_config.json", stop)
        hf_writer.write_json(temporary / RUN_CARD, student.card)
        (temporary / "README.md").write_text(model_card.render(config, student.card, kind, dtype))
        if kind == "jaxlin":
            hf_student.copy_code(temporary)


def _common_dtype(params: Any) -> str:
    found = {np.dtype(leaf.dtype).name for leaf in jax.tree.leaves(params)}
    return found.pop() if len(found) == 1 else "float32"


def push(folder: str | Path, repository: str) -> None:
    """Upload a folder to the hub. Raises UserError where it cannot be; the folder stays as it is."""
    kept = f"{folder} is complete; upload it with: hf upload {repository} {folder}"
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError(f"--push {repository}: huggingface_hub is not installed (pip install it); {kept}") from error
    try:
        huggingface_hub.create_repo(repository, exist_ok=True)
        huggingface_hub.upload_folder(repo_id=repository, folder_path=folder)
    except Exception as error:  # the hub's client raises many kinds
        raise UserError(f"--push {repository}: not possible ({hf_files.first_line(error)}); {kept}") from error


def main() -> None:
    """Entry point of `python -m jaxlin.export`."""
    settings = parse(Settings)
    if settings.push and not hf_files.HUB_NAME.fullmatch(settings.push):
        raise UserError(f"--push {settings.push}: give a repository as ORGANISATION/NAME")
    hf_writer.require_new(Path(settings.out))  # before anything is loaded
    export(open_student(settings.run), settings.out, format=settings.format, dtype=settings.dtype)
    print(f"written to {settings.out}")
    if settings.push:
        push(settings.out, settings.push)
        print(f"uploaded to https://huggingface.co/{settings.push}")


if __name__ == "__main__":
    run_main(main)
