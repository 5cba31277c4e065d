"""Benchmarks of lm-eval-harness, by its own task definitions: the paper's zero-shot tasks, IFEval and GSM8K.

Their data come from the hub, as the harness gets them, or from .jsonl files of the same fields: DIR/TASK/SPLIT.jsonl.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

from jaxlin.config import UserError
from jaxlin.evaluation.punkt import require_punkt
from jaxlin.evaluation.records import quiet_hub
from jaxlin.evaluation.task import Options, Result, Task, data_folder, files_sha256, read_jsonl, sha256_of
from jaxlin.runs import Teacher

# Task: its definition among the harness's, and the fields that its data must have.
DEFINITIONS = {
    "lambada_openai": ("lambada/lambada_openai.yaml", ("text",)),
    "lambada_standard": ("lambada/lambada_standard.yaml", ("text",)),
    "winogrande": ("winogrande/default.yaml", ("sentence", "option1", "option2", "answer")),
    "arc_easy": ("arc/arc_easy.yaml", ("question", "choices", "answerKey")),
    "arc_challenge": ("arc/arc_challenge.yaml", ("question", "choices", "answerKey")),
    "piqa": ("piqa/piqa.yaml", ("goal", "sol1", "sol2", "label")),
    "hellaswag": ("hellaswag/hellaswag.yaml", ("activity_label", "ctx_a", "ctx_b", "endings", "label")),
    "ifeval": ("ifeval/ifeval.yaml", ("key", "prompt", "instruction_id_list", "kwargs")),
    "gsm8k": ("gsm8k/gsm8k.yaml", ("question", "answer")),
}
# The columns of the paper's table 5, and the metric of each. LAMBADA is the mean of its two variants (section 4.1.1).
COLUMNS = {
    "lambada": (("lambada_openai", "lambada_standard"), "acc"),
    "winogrande": (("winogrande",), "acc"),
    "arc_easy": (("arc_easy",), "acc_norm"),
    "arc_challenge": (("arc_challenge",), "acc_norm"),
    "piqa": (("piqa",), "acc_norm"),
    "hellaswag": (("hellaswag",), "acc_norm"),
    "bear": (("bear",), "acc"),
}
FEWSHOT_SEED = 1234  # the harness's default


def average(metrics: Mapping[str, Mapping[str, float | None]]) -> dict[str, float]:
    """The paper's averages over its columns, from {task: metrics} of one model; those whose tasks are all there.

    `without_bear` is over six columns, `with_bear` over the paper's seven.
    """
    columns = {}
    for column, (tasks, metric) in COLUMNS.items():
        values = [metrics.get(task, {}).get(metric) for task in tasks]
        if all(value is not None for value in values):
            columns[column] = sum(v for v in values if v is not None) / len(values)
    found = {}
    for name, wanted in (("without_bear", [c for c in COLUMNS if c != "bear"]), ("with_bear", list(COLUMNS))):
        if all(column in columns for column in wanted):
            found[name] = sum(columns[column] for column in wanted) / len(wanted)
    return found


def measure(name: str, model: Teacher, options: Options) -> Result:
    """One of `DEFINITIONS`, for one model. Raises UserError where data or packages are missing."""
    harness = _import("jaxlin.evaluation.harness")
    evaluate = _import("lm_eval.evaluator").evaluate
    with _harness():
        task = _load(name, options)
        if options.predict_only:
            task.override_metric("bypass")
        lm = harness.JaxLM(
            model=model,
            batch_tokens=options.budget,
            mesh=options.mesh,
            bar=lambda title, total: options.bar(f"{name}, {title}", total),
        )
        found = evaluate(
            lm,
            {"tasks": {name: task}, "groups": {}},
            limit=options.limit,
            bootstrap_iters=0,
            apply_chat_template=options.chat,
            fewshot_as_multiturn=options.chat,
        )
    samples = found["samples"][name]
    first = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
    metrics = {} if options.predict_only else _metrics(found["results"][name])
    notes = [f"{found['n-shot'][name]}-shot"]
    notes += ["chat template"] * options.chat + ["local files"] * (options.data is not None)
    return Result(
        task=name,
        metrics=metrics,
        per_example=_per_example(samples, metrics),
        n=len(first),
        note=", ".join(notes),
        version=f"lm-eval {_import('lm_eval').__version__}, task {found['versions'][name]}",
        data_sha256=sha256_of([sample["doc"] for sample in first]),
        prompts_sha256=sha256_of([sample["arguments"] for sample in first]),
        seed=FEWSHOT_SEED,
        predictions=[{k: sample[k] for k in ("doc_id", "target", "resps")} for sample in first],
    )


def fingerprint(name: str, options: Options) -> str:
    """The definition's version, and the local files' contents or the hub's name for them."""
    version, config = _import("lm_eval").__version__, _definition(name, functions=False)
    if name == "ifeval":
        _import("langdetect")
        require_punkt(options.data)
    where = f"{config['dataset_path']} {config.get('dataset_name')}"
    if options.data is not None:
        where = files_sha256(_files(name, config, options).values())
    return f"lm-eval {version}, {where}"


def _task(name: str) -> Task:
    return Task(name, functools.partial(measure, name), functools.partial(fingerprint, name))


ZERO_SHOT = {task: _task(task) for tasks, _ in COLUMNS.values() for task in tasks if task != "bear"}
IFEVAL = {"ifeval": _task("ifeval")}
GSM8K = {"gsm8k": _task("gsm8k")}


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(f"this suite needs the package {error.name}: pip install 'jaxlin[eval]'") from None


def _definition(name: str, *, functions: bool) -> dict[str, Any]:
    """The harness's configuration of a task, with its Python functions or (which needs no imports) their names."""
    loader = _import("lm_eval.tasks._yaml_loader")
    folder = Path(_import("lm_eval.tasks").__file__).parent
    return loader.load_yaml(folder / DEFINITIONS[name][0], resolve_func=functions)


def _files(name: str, config: Mapping[str, Any], options: Options) -> dict[str, Path]:
    """The file of each split that the task reads."""
    splits = [config.get("test_split") or config["validation_split"]]
    if config.get("num_fewshot"):
        splits.append(config["fewshot_split"])
    folder = data_folder(options, name)
    files = {split: folder / f"{split}.jsonl" for split in splits}
    for path in files.values():
        if not path.is_file():
            raise UserError(f"{path}: no such file, and {name} needs it")
    return files


def _load(name: str, options: Options) -> Any:
    """The harness's task, with its data."""
    base, datasets = _import("lm_eval.api.task").ConfigurableTask, _import("datasets")
    if name == "ifeval":
        _import("langdetect")
        require_punkt(options.data)
    config = _definition(name, functions=True)
    for key in ("tag", "group", "task_list"):  # of the harness's index
        config.pop(key, None)
    if options.data is None:
        try:
            task = base(config=config)
        except (OSError, ValueError, _import("datasets.exceptions").DatasetsError) as error:
            why = str(error).partition("\n")[0] or type(error).__name__
            raise UserError(
                f"{name}: {config['dataset_path']} cannot be had from the hub ({why}); give --data"
            ) from error
    else:
        files = _files(name, config, options)
        with _fitting(name, options):
            records = {s: datasets.Dataset.from_list(read_jsonl(p, DEFINITIONS[name][1])) for s, p in files.items()}

        class LocalTask(base):
            def download(self, dataset_kwargs=None, **kwargs):
                self.dataset = datasets.DatasetDict(records)

            @functools.cached_property
            def eval_docs(self):  # the harness asks several times, and would prepare them each time
                return super().eval_docs

            def build_all_requests(self, **kwargs):
                with _fitting(name, options):
                    super().build_all_requests(**kwargs)

        unused = {split: None for split in ("training_split", "validation_split") if config.get(split) not in files}
        with _fitting(name, options):
            task = LocalTask(config=config | unused)
    if task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return task


@contextlib.contextmanager
def _fitting(name: str, options: Options) -> Iterator[None]:
    """Records that the definition cannot read fail in many ways: all of them are the data's fault."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        why = str(error).partition("\n")[0]
        raise UserError(
            f"{data_folder(options, name)}: the records do not fit the definition of {name} "
            f"({type(error).__name__}: {why})"
        ) from error


@contextlib.contextmanager
def _harness() -> Iterator[None]:
    """The harness without its bars and notices and those of datasets, compiling each of its templates once.

    By itself it compiles them for every example, which took six sevenths of the time that tasks needed besides models.
    """
    from tqdm import tqdm

    logger, bars = logging.getLogger("lm_eval"), _import("datasets.utils.logging")
    level, shown = logger.level, bars.is_progress_bar_enabled()
    templates = _import("lm_eval.utils").env
    compiled = functools.lru_cache(maxsize=256)(templates.from_string)
    logger.setLevel(logging.ERROR)
    bars.disable_progress_bar()
    try:
        with (
            quiet_hub(),
            mock.patch("lm_eval.api.task.tqdm", functools.partial(tqdm, disable=True)),
            mock.patch.object(templates, "from_string", compiled),
        ):
            yield
    finally:
        logger.setLevel(level)
        if shown:
            bars.enable_progress_bar()


def _metrics(found: Mapping[str, Any]) -> dict[str, float | None]:
    """The harness's "metric,filter" entries, without standard errors; a filter other than none is in the name."""
    metrics = {}
    for key, value in found.items():
        metric, _, chosen = key.partition(",")
        if chosen and not metric.endswith("_stderr") and isinstance(value, (int, float)):
            metrics[_name(metric, chosen)] = float(value)
    return metrics


def _name(metric: str, chosen: str) -> str:
    return metric if chosen == "none" else f"{metric}_{chosen.replace('-', '_')}"


def _per_example(samples: list[dict[str, Any]], metrics: Mapping[str, float | None]) -> dict[str, list[float]]:
    """Scores of single examples, of the metrics that are means of them."""
    scores: dict[str, list[float]] = {}
    for sample in samples:
        for metric in sample["metrics"]:
            if isinstance(sample[metric], (bool, int, float)):
                scores.setdefault(_name(metric, sample["filter"]), []).append(float(sample[metric]))
    return {
        name: values
        for name, values in scores.items()
        if (mean := metrics.get(name)) is not None and math.isclose(sum(values) / len(values), mean, abs_tol=1e-9)
    }
