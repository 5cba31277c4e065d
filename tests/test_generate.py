"""Generation: decoding computes what a full pass does, whatever the batch; sampling, stopping, streaming, errors."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlin import convert, generate
from jaxlin.config import UserError
from jaxlin.model import LanguageModel
from jaxlin.runs import Teacher
from jaxlin.sampling import Sampling
from jaxlin.session import Session, serving_params
from tests.models import TEACHER, random_params, student_of

LENGTHS = (3, 9, 6)
NEW = 6


def make(mixer):
    config = student_of(mixer)
    params = random_params(config)
    rng = np.random.default_rng(0)
    return config, params, [rng.integers(0, config.vocab_size, n).tolist() for n in LENGTHS]


@pytest.fixture(scope="module")
def teacher():
    return make("softmax")


@pytest.mark.parametrize("mixer", ["softmax", "gated_deltanet", "mlstm+softmax"])
def test_decoding_is_the_argmax_of_a_full_pass(mixer):
    """Ragged prompts, left padding, one or several chunks of prefill."""
    config, params, prompts = make(mixer)
    answers = generate.generate(config, params, prompts, max_new_tokens=NEW)
    assert answers == generate.generate(config, params, prompts, max_new_tokens=NEW, prefill_chunk=4)
    length = max(LENGTHS) + NEW
    tokens = np.array([p + a + [0] * (length - len(p) - NEW) for p, a in zip(prompts, answers, strict=True)])
    logits = jax.jit(lambda t: LanguageModel(config).apply({"params": params}, t).logits)(tokens)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        first = len(prompt) - 1
        assert answer == jnp.argmax(logits[row, first : first + NEW], -1).tolist()


def test_the_batch_does_not_matter(teacher):
    config, params, prompts = teacher
    together = generate.generate(config, params, prompts, max_new_tokens=NEW)
    assert together == [generate.generate(config, params, [p], max_new_tokens=NEW)[0] for p in prompts]
    warm = dict(max_new_tokens=NEW, sampling=Sampling(1.0), seed=3)
    sampled = generate.generate(config, params, prompts, **warm)
    assert sampled[:1] == generate.generate(config, params, prompts[:1], **warm)
    assert generate.generate(config, params, [], max_new_tokens=NEW) == []


def test_sampling(teacher):
    config, params, prompts = teacher

    def sample(seed=0, **kw):
        return generate.generate(config, params, prompts, max_new_tokens=NEW, sampling=Sampling(**kw), seed=seed)

    greedy, warm = sample(), dict(temperature=5.0)
    assert sample(**warm, seed=1) == sample(**warm, seed=1) != sample(**warm, seed=2)
    assert sample(**warm, top_k=1) == sample(**warm, top_p=1e-6) == sample(**warm, min_p=1.0) == greedy
    unlike = sample(repetition_penalty=1e6)  # nothing comes twice while the scores of something new are positive
    assert all(len({*p, *a}) == len(set(p)) + NEW for p, a in zip(prompts, unlike, strict=True))


def test_stop_ids(teacher):
    config, params, prompts = teacher
    free = generate.generate(config, params, prompts, max_new_tokens=NEW)
    stop = free[1][2]
    stopped = generate.generate(config, params, prompts, max_new_tokens=NEW, stop_ids=[stop])
    assert stopped == [a[: a.index(stop)] if stop in a else a for a in free]
    assert len(stopped[1]) <= 2


def test_a_long_answer_takes_several_blocks(teacher):
    """Counts at and around the block's size; each is the beginning of the longest."""
    config, params, prompts = teacher
    longest = generate.generate(config, params, prompts, max_new_tokens=generate.BLOCK + 2)
    assert [len(a) for a in longest] == [generate.BLOCK + 2] * 3
    for n in (1, generate.BLOCK + 1):
        assert generate.generate(config, params, prompts, max_new_tokens=n) == [a[:n] for a in longest]


def test_stream_is_generate(teacher):
    config, params, _ = teacher
    tokenizer = convert.byte_tokenizer()
    prompt = [5, 6, 7]
    settings = dict(max_new_tokens=20, sampling=Sampling(1.0, repetition_penalty=1.2))

    def pieces(**kw):
        session = Session(config, params, seed=4)
        session.read(prompt)
        return list(generate.stream(session, tokenizer, **settings, **kw))

    (tokens,) = generate.generate(config, params, [prompt], **settings, seed=4)
    assert "".join(pieces()) == tokenizer.decode(tokens)
    assert len(pieces()) > 5
    assert "".join(pieces(stop_ids=[tokens[3]])) == tokenizer.decode(tokens[: tokens.index(tokens[3])])
    text = tokenizer.decode(tokens)
    assert "".join(pieces(stop=[text[4:6]])) == text.partition(text[4:6])[0]


def test_serving_params_change_nothing(teacher):
    _, params, prompts = teacher
    config = replace(TEACHER, dtype="bfloat16")
    run = jax.jit(lambda p: LanguageModel(config).apply({"params": p}, jnp.array(prompts[:1])).logits)
    np.testing.assert_array_equal(run(params), run(serving_params(params, config)))

    config = replace(student_of("gla"), dtype="bfloat16")
    small = jax.eval_shape(lambda: serving_params(random_params(config), config))["layers"]["block_0"]
    assert small["mixer"]["q_proj"]["kernel"].dtype == small["mlp"]["down_proj"]["kernel"].dtype == jnp.bfloat16
    assert small["mixer"]["gk_proj"]["kernel"].dtype == small["input_layernorm"]["weight"].dtype == jnp.float32


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(max_new_tokens=0), "--max-new-tokens 0"),
        (dict(prompts=[[1], []]), "prompt 1 is empty"),
    ],
)
def test_refuses(teacher, change, words):
    settings = dict(prompts=[[1]], max_new_tokens=2) | change
    with pytest.raises(UserError, match=words):
        generate.generate(*teacher[:2], **settings)


def test_refuses_unknown_tokens(teacher):
    with pytest.raises(ValueError, match="not in a vocabulary of 97"):
        generate.generate(*teacher[:2], [[TEACHER.vocab_size]], max_new_tokens=1)


# ---- the command


def call(monkeypatch, *args, stdin=""):
    monkeypatch.setattr(sys, "argv", ["generate", *args])
    monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    generate.main()


@pytest.mark.parametrize(
    "args, words",
    [
        (["--run", "missing", "--prompt", "a"], "--run missing: no run there"),
        (["--run", "missing"], "the prompt is empty"),
        (["--run", "missing", "--prompt", ""], "the prompt is empty"),
        (["--prompt", "a"], "give either --run DIR or --teacher T"),
        (["--run", "missing", "--prompt", "a\udcff"], "--prompt: holds half a character"),
        (["--run", "missing", "--prompt", "a", "--save-state", "."], "--save-state .: is a folder"),
        (["--teacher", "demo", "--run", "x", "--prompt", "a"], "--run x and --teacher demo: give one of them"),
        (["--teacher", "demo", "--prompt", "a", "--teacher-model"], "--teacher-model: only with --run"),
        (["--run", "missing", "--prompt", "a", "--temperature", "-1"], "--temperature -1.0"),
        (["--run", "missing", "--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens 0"),
        (["--run", "missing", "--prompt", "a", "--min-p", "2"], "--min-p 2.0"),
        (["--run", "missing", "--prompt", "a", "--top-k", "5"], "--top-k 5: temperature 0 takes the likeliest"),
        (["--run", "missing", "--prompt", "a", "--repetition-penalty", "0"], "--repetition-penalty 0.0"),
        (["--run", "missing", "--prompt", "a", "--stop", ""], '--stop ""'),
        (["--run", "missing", "--prompts", "missing"], "--prompts missing: cannot be read"),
        (["--run", "missing", "--prompts", "p", "--prompt", "a"], "--prompt: only for a single text"),
        (["--run", "missing", "--prompts", "p", "--save-state", "s"], "--save-state: only for a single text"),
        (["--run", "missing", "--prompts", "p", "--batch-size", "0"], "--batch-size 0"),
        (["--run", "missing", "--prompt", "a", "--out", "o"], "--out o: only with --prompts"),
    ],
)
def test_command_refuses(monkeypatch, args, words):
    with pytest.raises(UserError, match=words):
        call(monkeypatch, *args)


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("p.txt", "\n  \n", "holds no prompt"),
        ("p.txt", b"\xff", "not UTF-8"),
        ("p.jsonl", '{"prompt": "a"}\n{"text": "b"}', 'line 2: has no text "prompt"'),
        ("p.jsonl", '{"prompt": ""}', 'line 1: has no text "prompt"'),
        ("p.jsonl", "a", "line 1: is no JSON"),
    ],
)
def test_prompts_that_cannot_be_read(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=words):
        generate.read_prompts(str(tmp_path / name))


@pytest.fixture
def speaker(monkeypatch):
    """What every command line opens: a tiny student that knows all bytes."""
    config = student_of("gla", teacher=replace(TEACHER, vocab_size=264))
    model = Teacher(config, random_params(config), convert.byte_tokenizer())
    monkeypatch.setattr(generate, "load_model", lambda *args, **kw: model)
    return model


def test_a_text_begins_as_the_tokenizer_begins_it(monkeypatch, tmp_path, speaker):
    """And goes on without another beginning."""
    read, real = [], generate.Session.read
    monkeypatch.setattr(convert, "begin_ids", lambda tokenizer: [7])
    monkeypatch.setattr(generate.Session, "read", lambda self, tokens: (read.append(tokens), real(self, tokens)))
    state, two = str(tmp_path / "state"), ["--run", "x", "--max-new-tokens", "2"]
    call(monkeypatch, *two, "--prompt", "ab", "--save-state", state)
    call(monkeypatch, *two, "--prompt", "c", "--load-state", state)
    ids = speaker.tokenizer("abc")["input_ids"]
    assert read == [[7, *ids[:2]], ids[2:]]


def test_command(monkeypatch, capsys, tmp_path, speaker):
    """One text whole, or in two parts through a saved state; many prompts to a file, of which none is half-written."""
    warm = ["--run", "x", "--temperature", "1", "--max-new-tokens"]
    call(monkeypatch, *warm, "12", "--prompt", "ab")
    whole = capsys.readouterr().out
    state = str(tmp_path / "state")
    call(monkeypatch, *warm, "6", "--prompt", "ab", "--save-state", state)
    first = capsys.readouterr().out
    call(monkeypatch, *warm, "5", "--load-state", state)
    assert (first[:-1] + capsys.readouterr().out)[:4] == whole[:4]

    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    texts = ["ab", "c\nd", "efghi"]
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    call(monkeypatch, *warm, "12", "--prompts", str(prompts), "--out", str(out), "--batch-size", "2")
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["prompt"] for record in records] == texts
    assert whole == f"ab{records[0]['text']}\n" and not capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.jsonl", "prompts.jsonl", "state"]
    with pytest.raises(UserError, match="cannot be written"):
        call(monkeypatch, *warm, "1", "--prompts", str(prompts), "--out", str(tmp_path / "no" / "out"))
