"""Needles: the demo teacher finds those that `generate` of transformers finds with the same weights and prompts.

Prompts are RULER's, of its three variants in turn. $JAXLIN_PARITY_NEEDLES: how many of each length, 100 by default.
"""

from __future__ import annotations

import os

import pytest

from jaxlin.evaluation import haystack, ruler
from jaxlin.evaluation.punkt import require_punkt
from jaxlin.evaluation.scoring import continuations
from tests import demo_teacher

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]
COUNT = int(os.environ.get("JAXLIN_PARITY_NEEDLES", "100"))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return demo_teacher.both(tmp_path_factory.mktemp("hf"))


def questions(length, count, tokenizer):
    """`count` questions, the first ones of each variant in turn."""
    for package in ("wonderwords", "nltk"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    data = demo_teacher.require_data()
    require_punkt(data)
    each = -(-count // len(ruler.VARIANTS))
    sets = [
        ruler.samples(v, tokenizer, length, each, keys=haystack.word_pairs(), essay=demo_teacher.essay(data))
        for v in ruler.VARIANTS.values()
    ]
    return [question for group in zip(*sets, strict=True) for question in group][:count]


def generate(model, prompts, stop):
    """Greedy continuations by transformers, of prompts padded on the left."""
    import torch

    longest = max(map(len, prompts))
    tokens = torch.tensor([[stop] * (longest - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    found = model.generate(
        tokens,
        attention_mask=mask,
        max_new_tokens=ruler.ANSWER_TOKENS,
        do_sample=False,
        eos_token_id=stop,
        pad_token_id=stop,
    )
    answers = [row[longest:].tolist() for row in found]
    return [answer[: answer.index(stop)] if stop in answer else answer for answer in answers]


@pytest.mark.parametrize("length", ruler.LENGTHS)
def test_needles(models, length):
    theirs, ours = models
    stop = ours.tokenizer.eos_token_id
    asked = questions(length, COUNT, ours.tokenizer)
    prompts = [question.tokens for question in asked]
    at_once = max(1, (8192 if theirs.device.type == "cpu" else 65_536) // length)
    expected = demo_teacher.kept(f"needles_{length}", prompts, lambda p: generate(theirs, p, stop), at_once)
    found = continuations(ours, prompts, ruler.ANSWER_TOKENS, stop_ids=(stop,))
    same = sum(a == b for a, b in zip(found, expected, strict=True))
    scores = [
        sum(q.answered(ours.tokenizer.decode(a)) for q, a in zip(asked, answers, strict=True))
        for answers in (expected, found)
    ]
    print(f"\n{length} tokens, {len(asked)} prompts: theirs {scores[0]}, ours {scores[1]} found; {same} answers equal")
    assert abs(scores[0] - scores[1]) <= 1
    assert same >= 0.95 * len(asked)
