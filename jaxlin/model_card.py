"""The README.md of an exported student: a function of its configuration and of the run card beside it, no more."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from jaxlin.config import ModelConfig
from jaxlin.evaluation.report import number
from jaxlin.hf_files import HUB_NAME
from jaxlin.mixers import MIXERS
from jaxlin.pattern import pattern_of

MEANING = {1: "attention outputs", 2: "hidden states", 3: "logits"}
LOADING = {
    "softmax": ("transformers", "", "A class of transformers' own; nothing else is needed."),
    "jaxlin": (
        "transformers",
        ", trust_remote_code=True",
        "The model's code is in this folder (`modeling_jaxlin.py`); it needs torch and transformers, nothing else.",
    ),
    "fla": (
        "fla  # flash-linear-attention 0.6.0\nfrom transformers",
        "",
        "The classes are those of [FLA](https://github.com/fla-org/flash-linear-attention), which needs a GPU.",
    ),
}


def render(config: ModelConfig, card: dict[str, Any], kind: str, dtype: str) -> str:
    """The model card.

    Args:
        config: the student's architecture.
        card: the run card, as `export.run_card` makes it.
        kind: "softmax", "jaxlin" or "fla": whose classes load the folder.
        dtype: what the tensors are stored in.
    """
    parts = [_head(card), _what(config, card, dtype), _loading(kind), _training(card), *_evaluation(card)]
    return "\n\n".join(parts) + "\n"


def _head(card: dict[str, Any]) -> str:
    lines = ["library_name: transformers", "pipeline_tag: text-generation", "tags:", "- jaxlin", "- linear-attention"]
    if HUB_NAME.fullmatch(teacher := card["settings"]["teacher"]):
        lines.append(f"base_model: {teacher}")
    return "\n".join(["---", *lines, "---"])


def _what(config: ModelConfig, card: dict[str, Any], dtype: str) -> str:
    settings, run = card["settings"], card["card"]
    pattern = pattern_of(config.mixer)
    title = f"# {_short(settings['teacher'])}, linearized: {pattern}"
    if config.mixer == ("softmax",):
        return f"# {_short(settings['teacher'])}, fine-tuned\n\nThe baseline of a linearization: its attention stays."
    size = f"{run['student_parameters'] / 1e6:,.1f}M parameters" if run.get("student_parameters") else "A model"
    every = {1: "every layer", config.num_hidden_layers: "the layers that the title names"}.get(
        config.period, f"each {config.period} layers in turn"
    )
    text = [
        f"{size} in {dtype}, {config.num_hidden_layers} layers of width {config.hidden_size}. The softmax attention of "
        f"`{settings['teacher']}` was replaced in {every} by the mixers below, and distilled with jaxlin "
        "([arXiv 2504.14366](https://arxiv.org/abs/2504.14366)). States of linear-time mixers have a constant size: "
        "generating takes the same memory and time for every token.",
        "",
    ]
    for name, options in dict.fromkeys(zip(config.mixer, config.options, strict=True)):
        equation = (MIXERS[name].__doc__ or "").strip().splitlines()[0]
        text.append(f"- `{name}`: {equation}")
        if hasattr(MIXERS[name], "head_layout"):
            heads, head = MIXERS[name].head_layout(config, options)
            text[-1] += f" {heads} heads of {head}."
    text.append(f"\nThe license of the teacher holds for this model too. Preset: `{settings['preset']}`.")
    return "\n".join([title, "", *text])


def _short(teacher: str) -> str:
    return teacher.rstrip("/").rsplit("/", 1)[-1]


def _loading(kind: str) -> str:
    imports, options, note = LOADING[kind]
    back = "" if kind == "fla" else (
        "\n\nIn jaxlin, the folder is a model like any other:\n\n```bash\n"
        'python -m jaxlin.generate --teacher FOLDER --prompt "The capital of France is"\n```'
    )  # fmt: skip
    imports = f"import {imports}" if kind == "fla" else f"from {imports}"
    return (
        "## Use\n\n```python\n"
        f"{imports} import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("FOLDER"{options})\n'
        f'model = AutoModelForCausalLM.from_pretrained("FOLDER"{options})\n'
        'inputs = tokenizer("The capital of France is", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0]))\n```\n\n"
        f"{note}{back}"
    )


def _training(card: dict[str, Any]) -> str:
    settings, run = card["settings"], card["card"]
    lines = ["## Training", "", "| stage | aligns | tokens | learning rates, copied and new | loss, start to end |"]
    lines.append("|---|---|---|---|---|")
    for stage, what in card["stages"].items():
        loss = card["losses"].get(f"stage{stage}")
        ends = f"{number(loss['start'])} to {number(loss['end'])}" if loss else ""
        rates = f"{what['lr']:g}, {what['lr_new']:g}"
        lines.append(f"| {stage} | {MEANING[int(stage)]} | {what['tokens']:,} | {rates} | {ends} |")
    sources = settings["conversations"] or settings["text"]
    lines += ["", f"- Trained on {', '.join(sources) if sources else 'the documentation of Python'}"]
    lines.append(f"- Teacher {settings['teacher']}, products in {settings['dtype']}, seed {settings['seed']}")
    if settings.get("init_from"):
        lines.append(f"- Started from the run `{settings['init_from']}`")
    if run.get("devices"):
        versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
        lines.append(f"- On {run['devices']}, with {versions}")
    if run.get("git_commit"):
        lines.append(f"- By jaxlin's commit {run['git_commit']}, checkpoint of step {card['step']}")
    return "\n".join([*lines, "", "Losses are of held-out data. Every setting is in `run_card.json`."])


def _evaluation(card: dict[str, Any]) -> Iterator[str]:
    if not card["evaluation"]:
        return
    lines = ["## Evaluation", "", "| task | metric | examples | student | teacher |", "|---|---|---|---|---|"]
    examples = card.get("examples", {})
    for task, models in card["evaluation"].items():
        for metric in dict.fromkeys(name for values in models.values() for name in values):
            cells = (number(models.get(model, {}).get(metric)) for model in ("student", "teacher"))
            lines.append(f"| {task} | {metric.replace('_', ' ')} | {examples.get(task, '')} | {' | '.join(cells)} |")
    yield "\n".join(lines)
