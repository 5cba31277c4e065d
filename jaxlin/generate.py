"""Text from a model: the prompt in one pass, then token by token from a state of constant size.

Command: `python -m jaxlin.generate --run DIR --prompt "..."`; without `--prompt` it reads standard input.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from jaxlin import convert, runs
from jaxlin.command_line import parse, run_main
from jaxlin.config import ModelConfig, RunConfig, UserError
from jaxlin.model import forward, init_state
from jaxlin.session import PAD_TO, PREFILL_CHUNK, Sampling, Session, choose, left_pad, prefill, row_keys, serving_params
from jaxlin.sharding import on_every_device

BLOCK = 16  # tokens decoded between two looks at what came out


def generate(
    config: ModelConfig,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_ids: Sequence[int] = (),
    finished: Callable[[list[int]], bool] | None = None,
    pad_to: int = PAD_TO,
    prefill_chunk: int = PREFILL_CHUNK,
    streams: Sequence[int] | None = None,
) -> list[list[int]]:
    """Continue each prompt (token ids) by up to `max_new_tokens` tokens; a token in `stop_ids` ends it and is left out.

    `finished` is asked now and then whether a continuation, so far, may end too; what it has by then is kept.
    Prompts of different lengths go through together, padded on the left. A prompt's continuation does not depend on
    the prompts beside it; sampling draws from stream `streams[row]` of the seed's random numbers, by default `row`.
    Raises UserError for an empty prompt or an impossible setting, ValueError for ids outside the vocabulary.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    live = set(range(len(prompts)))
    if not prompts:
        return answers
    sampling, padding = Sampling(temperature, top_k, top_p), (pad_to, prefill_chunk)
    for block in _blocks(config, params, prompts, max_new_tokens, sampling, seed, padding, streams):
        for row in sorted(live):
            for token in block[row].tolist():
                if token in stop_ids:
                    live.discard(row)
                    break
                answers[row].append(token)
            if finished is not None and row in live and finished(answers[row]):
                live.discard(row)
        if not live:
            break
    return answers


def stream(
    config: ModelConfig,
    params: Any,
    tokenizer: Any,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_ids: Sequence[int] = (),
) -> Iterator[str]:
    """The continuation of one prompt, as pieces of text that come as soon as their characters are complete."""
    sampling, text = Sampling(temperature, top_k, top_p), Detokenizer(tokenizer)
    check_budget(max_new_tokens)
    room = -(-(len(prompt) + max_new_tokens) // PAD_TO) * PAD_TO  # few sizes are compiled
    session = Session(config, serving_params(params, config), seed=seed, room=room)
    if not prompt:
        raise UserError("--prompt: it is empty; give at least one token")
    session.read(prompt)
    for token in session.stream(sampling, max_new_tokens, stop_ids):
        if piece := text.push(token):
            yield piece
    if piece := text.flush():
        yield piece


class Detokenizer:
    """Tokens to text, one at a time. A token may hold a part of a character: it waits for the rest."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []  # the last complete piece, for what comes after it, and what is not yet complete
        self._context = 0  # how many of them are that piece
        self._shown = 0  # characters of their text that were given out

    def push(self, token: int) -> str:
        """The text that `token` completes."""
        self._tokens.append(token)
        text = self._decode(self._tokens)
        whole = not text.endswith("\N{REPLACEMENT CHARACTER}")  # what an unfinished character decodes to
        piece = text[self._shown : len(text) if whole else -1]
        self._shown += len(piece)
        if whole:
            self._tokens = self._tokens[self._context :]
            self._context, self._shown = len(self._tokens), len(self._decode(self._tokens))
        return piece

    def flush(self) -> str:
        """What is left: a character that never became complete."""
        return self._decode(self._tokens)[self._shown :]

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _blocks(
    config: ModelConfig,
    params,
    prompts,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    padding: tuple[int, int] = (PAD_TO, PREFILL_CHUNK),
    streams: Sequence[int] | None = None,
) -> Iterator[np.ndarray]:
    """New tokens [B, n]: one after the prompts, then BLOCK at a time, `max_new_tokens` in all.

    `padding`: prompts are padded to a multiple of the first, and longer ones than the second read in such chunks.
    The next block is already being computed when one is given out, so the device never waits for the caller.
    """
    check_budget(max_new_tokens)
    pad_to, chunk = padding
    if chunk < 1 or pad_to < 1:
        raise ValueError(f"pad_to={pad_to}, prefill_chunk={chunk}: must be at least 1")
    tokens, segment_ids = left_pad(prompts, config.vocab_size, pad_to, chunk)
    params = serving_params(params, config)
    rounds = -(-(max_new_tokens - 1) // BLOCK)
    state = init_state(config, len(prompts), tokens.shape[1] + rounds * BLOCK)
    logits, state = prefill(config, params, state, tokens, segment_ids, chunk)
    keys = row_keys(seed, range(len(prompts)) if streams is None else streams)
    token = choose(sampling, keys, jnp.uint32(0), logits)
    ready, left = token[:, None], max_new_tokens
    carry = (token, jnp.uint32(1), state)
    for done in range(rounds + 1):
        following = None
        if done < rounds:
            following, carry = _decode(config, sampling, BLOCK, params, keys, carry)
        block = np.asarray(ready)[:, :left]
        left -= block.shape[1]
        yield block
        ready = following


@jax.jit(static_argnums=(0, 1, 2), donate_argnums=5)
def _decode(config: ModelConfig, sampling: Sampling, steps: int, params, keys, carry):
    """`steps` more tokens of each row, [B, steps]; carry = (last token [B], its number + 1, state)."""

    def step(carry, _):
        token, number, state = carry
        out = forward(config, params, token[:, None], state=state)
        assert out.logits is not None
        token = choose(sampling, keys, number, out.logits[:, 0])
        return (token, number + 1, out.state), token

    carry, tokens = jax.lax.scan(step, carry, length=steps)
    return on_every_device(tokens.T), carry


def check_budget(max_new_tokens: int) -> None:
    """Refuse to write less than a token."""
    if max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {max_new_tokens}: must be at least 1")


@dataclass(frozen=True)
class GenerationSettings:
    """Which model writes, and how it chooses: what the commands that generate share."""

    run: str = ""
    """Run folder of the student."""
    teacher: str = ""
    """Instead of a run: "demo", a Hugging Face name or folder, or a .gguf file."""
    teacher_model: tyro.conf.UseCounterAction[int] = 0
    """Generate with the run's teacher rather than its student."""
    max_new_tokens: int = 128
    """Most tokens to write."""
    temperature: float = 0.0
    """Randomness; 0 always takes the likeliest token."""
    top_k: int = 0
    """Choose among this many likeliest tokens; 0 means all."""
    top_p: float = 1.0
    """Choose among the likeliest tokens that together have this probability."""
    seed: int = 0
    """Seed of the choice."""

    @property
    def sampling(self) -> Sampling:
        """How the next token is chosen. Raises UserError for values out of range."""
        return Sampling(self.temperature, self.top_k, self.top_p)

    def check(self) -> None:
        """Refuse values out of range, before the model is loaded."""
        _ = self.sampling
        check_budget(self.max_new_tokens)

    def load(self) -> runs.Teacher:
        """The model; see `load_model`."""
        return load_model(self.run, self.teacher, teacher_model=bool(self.teacher_model))


@dataclass(frozen=True)
class Settings(GenerationSettings):
    """Continue a text with a student, or with its teacher."""

    prompt: str | None = None
    """The text to continue; read from standard input where it is absent."""


def load_model(run: str, teacher: str, *, teacher_model: bool = False) -> runs.Teacher:
    """The model that a command line asks for: a run's student or teacher, or a teacher alone.

    Raises UserError where neither or both of `run` and `teacher` are given, and what opening them raises.
    """
    if bool(run) == bool(teacher):
        raise UserError("give either --run DIR or --teacher T")
    if teacher and teacher_model:
        raise UserError("--teacher-model: only with --run, it chooses the run's teacher")
    if not run:
        return runs.load_teacher(RunConfig(teacher=teacher))
    opened = runs.open_run(Path(run))
    if teacher_model:
        return runs.load_teacher(opened.config)
    name = opened.config.teacher
    tokenizer = convert.byte_tokenizer() if name == "random" else convert.load_tokenizer(name)
    return runs.Teacher(opened.student, jax.tree.map(jnp.asarray, opened.params()), tokenizer)


def stop_tokens(tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end a text."""
    ids = {tokenizer.eos_token_id, convert.end_of_text_id(tokenizer)}
    return tuple(sorted(i for i in ids if i is not None))


def main() -> None:
    """Entry point of `python -m jaxlin.generate`."""
    settings = parse(Settings)
    settings.check()
    prompt = sys.stdin.read() if settings.prompt is None else settings.prompt
    if not prompt:
        raise UserError("the prompt is empty: give --prompt or text on standard input")
    model = settings.load()
    pieces = stream(
        model.config,
        model.params,
        model.tokenizer,
        model.tokenizer(prompt, add_special_tokens=False)["input_ids"],
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        seed=settings.seed,
        stop_ids=stop_tokens(model.tokenizer),
    )
    print(prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    run_main(main)
