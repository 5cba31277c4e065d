"""The harness's own model (transformers, torch on the CPU, float32) and ours, on the demo teacher and real tasks."""

from __future__ import annotations

import functools
import os

import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")

from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.evaluator import evaluate

from jaxlin.evaluation import benchmarks
from jaxlin.evaluation.harness import JaxLM
from jaxlin.evaluation.task import Options, data_folder, read_jsonl
from tests import demo_teacher

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]
TASKS = ("lambada_openai", "piqa", "arc_easy", "hellaswag")
EXAMPLES = int(os.environ.get("JAXLIN_PARITY_EXAMPLES", "200"))  # of each task
PROMPTS = 64


@pytest.fixture(scope="module")
def data():
    return Options(data=demo_teacher.require_data(), limit=EXAMPLES)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(theirs, ours) of the demo teacher."""
    hflm = pytest.importorskip("lm_eval.models.huggingface", reason="the harness's hf model needs torch, accelerate")
    model, teacher = demo_teacher.both(tmp_path_factory.mktemp("hf"))
    size = 32 if model.device.type == "cpu" else 64
    theirs = hflm.HFLM(
        pretrained=model, tokenizer=teacher.tokenizer, batch_size=size, device=str(model.device), max_length=2048
    )
    if (folder := demo_teacher.parity_cache()) is not None:
        theirs = CachingLM(theirs, str(folder / "harness.db"))
    return theirs, JaxLM(model=teacher, max_length=2048)


@functools.cache
def samples_of(lm, name, options):
    """(samples, scores) of a task."""
    task = benchmarks._load(name, options)
    found = evaluate(lm, {"tasks": {name: task}, "groups": {}}, limit=options.limit, bootstrap_iters=0)
    return found["samples"][name], benchmarks._metrics(found["results"][name])


def test_greedy_continuations(models, data):
    """The same text after 64 prompts of many lengths."""
    questions = read_jsonl(data_folder(data, "gsm8k") / "test.jsonl")[: PROMPTS // 2]
    stories = read_jsonl(data_folder(data, "lambada_openai") / "test.jsonl")[: PROMPTS // 2]
    prompts = [f"Question: {q['question']}\nAnswer:" for q in questions] + [s["text"] for s in stories]
    settings = {"until": ["Question:"], "max_gen_toks": 48, "do_sample": False}
    requests = [Instance("generate_until", {}, (prompt, settings), i) for i, prompt in enumerate(prompts)]
    theirs, ours = (lm.generate_until(requests) for lm in models)
    same = sum(a == b for a, b in zip(theirs, ours, strict=True))
    print(f"\n{same} of {len(prompts)} greedy continuations are identical")
    assert same >= 0.95 * len(prompts)


@pytest.mark.parametrize("name", TASKS)
def test_scores(models, data, name):
    """Log-likelihoods of single requests within 1e-3, and the same task scores."""
    (theirs, their_scores), (ours, our_scores) = (samples_of(lm, name, data) for lm in models)
    expected, found = (
        np.array([response[0][0] for sample in samples for response in sample["resps"]]) for samples in (theirs, ours)
    )
    error = np.abs(found / expected - 1)
    print(f"\n{name}: {len(expected)} requests, largest relative error {error.max():.1e}, mean {error.mean():.1e}")
    print(f"{name}: theirs {their_scores}, ours {our_scores}")
    assert [s["arguments"] for s in theirs] == [s["arguments"] for s in ours]
    assert error.max() < 1e-3
    for metric, value in their_scores.items():
        assert our_scores[metric] == pytest.approx(value, rel=1e-3 if metric == "perplexity" else 1e-12), metric
