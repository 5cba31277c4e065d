"""Text from a model: the prompt in one pass, then token by token from a state of constant size.

Command: `python -m jaxlin.generate --run DIR --prompt "..."`; without `--prompt` it reads standard input. With
`--prompts FILE` it continues many, `--batch-size` at a time, and writes a line of JSON for each.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import jax
import jax.numpy as jnp

from jaxlin import convert, runs
from jaxlin.command_line import one_of, parse, run_main, whole_text
from jaxlin.config import ModelConfig, RunConfig, Switch, UserError
from jaxlin.decoding import BLOCK
from jaxlin.detokenizer import TextUntil, check_stops
from jaxlin.drafts import draft
from jaxlin.engine import Completion, Engine, check_budget
from jaxlin.prefix_cache import common_prefix
from jaxlin.sampling import GREEDY, Sampling
from jaxlin.session import PAD_TO, PREFILL_CHUNK, Session, serving_params

WORTH_REMEMBERING = 64  # tokens that all prompts of a file begin with


def generate(
    config: ModelConfig,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    stop_ids: Sequence[int] = (),
    finished: Callable[[list[int]], bool] | None = None,
    batch_size: int | None = None,
    pad_to: int = PAD_TO,
    prefill_chunk: int = PREFILL_CHUNK,
    streams: Sequence[int] | None = None,
) -> list[list[int]]:
    """Continue each prompt (token ids) by up to `max_new_tokens` tokens; a token in `stop_ids` ends it and is left out.

    `finished` is asked now and then whether a continuation, so far, may end too; what it has by then is kept.
    `batch_size` prompts go through together, by default all; where one ends, the next takes its place. A prompt's
    continuation does not depend on the prompts beside it; sampling draws from stream `streams[i]` of the seed's random
    numbers, by default `i`. See `Engine` for more.
    Raises UserError for an empty prompt or an impossible setting, ValueError for ids outside the vocabulary.
    """
    check_budget(max_new_tokens)
    if not prompts:
        return []
    longest = -(-max(map(len, prompts)) // pad_to) * pad_to  # few sizes of caches are compiled
    engine = Engine(
        config,
        params,
        slots=min(batch_size or len(prompts), len(prompts)),
        room=longest + -(-max_new_tokens // BLOCK) * BLOCK,
        sampling=sampling,
        seed=seed,
        stop_ids=stop_ids,
        finished=finished,
        pad_to=pad_to,
        prefill_chunk=prefill_chunk,
    )
    return [completion.tokens for completion in engine.run(prompts, max_new_tokens, streams)]


def stream(
    session: Session,
    tokenizer: Any,
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    stop_ids: Sequence[int] = (),
    stop: Sequence[str] = (),
    before: Sequence[int] = (),
) -> Iterator[str]:
    """What follows in a session that has read a prompt, as pieces of text that come as soon as they are certain.

    That is, when their characters are complete, and no string of `stop`, which ends the text, may begin in them.
    `before` is the prompt, to whose last tokens the text is joined.
    """
    check_budget(max_new_tokens)
    text = TextUntil(tokenizer, stop, before)
    for token in session.stream(sampling, max_new_tokens, stop_ids):
        if piece := text.push(token):
            yield piece
        if text.stopped:
            return
    if piece := text.flush():
        yield piece


@dataclass(frozen=True)
class GenerationSettings:
    """Which model writes, and how it chooses: what the commands that generate share."""

    run: str = ""
    """Run folder of the student."""
    teacher: str = ""
    """Instead of a run: "demo", a Hugging Face name or folder, or a .gguf file."""
    teacher_model: Switch = 0
    """Generate with the run's teacher rather than its student."""
    max_new_tokens: int = 128
    """Most tokens to write."""
    temperature: float = 0.0
    """Randomness; 0 always takes the likeliest token."""
    top_k: int = 0
    """Choose among this many likeliest tokens; 0 means all."""
    top_p: float = 1.0
    """Choose among the likeliest tokens that together have this probability."""
    min_p: float = 0.0
    """Choose among tokens of at least this share of the likeliest one's probability."""
    repetition_penalty: float = 1.0
    """Makes tokens that were there before less likely, above 1; see jaxlin/sampling.py."""
    seed: int = 0
    """Seed of the choice."""
    unroll: Switch = 0
    """No loop over layers in the program: more tokens a second, after a longer compilation."""

    @property
    def sampling(self) -> Sampling:
        """How the next token is chosen. Raises UserError for values out of range."""
        return Sampling(self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty)

    def check(self) -> None:
        """Refuse values out of range or without effect, before the model is loaded."""
        sampling = self.sampling
        check_budget(self.max_new_tokens)
        among = dict(top_k=sampling.top_k, top_p=sampling.top_p < 1 and sampling.top_p, min_p=sampling.min_p)
        for flag, value in among.items():
            if value and sampling.temperature == 0:
                raise UserError(
                    f"--{flag.replace('_', '-')} {value}: temperature 0 takes the likeliest token alone; "
                    "set --temperature above it"
                )

    def load(self) -> runs.Teacher:
        """The model; see `load_model`."""
        return load_model(self.run, self.teacher, teacher_model=bool(self.teacher_model))


@dataclass(frozen=True)
class Settings(GenerationSettings):
    """Continue a text, or many, with a student or with its teacher."""

    prompt: str | None = None
    """The text to continue; read from standard input where it is absent."""
    stop: tuple[str, ...] = ()
    """Texts that end a continuation, and are left out."""
    prompts: str = ""
    """Instead of one prompt, a file of them: one a line, or .jsonl with a field "prompt"."""
    out: str = ""
    """Where the continuations of --prompts go, .jsonl; standard output where it is absent."""
    batch_size: int = 16
    """Prompts of --prompts that are continued together."""
    save_state: str = ""
    """Write what the model keeps of the text to this file, at the end; a stop string that ended it is part of it."""
    load_state: str = ""
    """Go on from such a file; --prompt, if any, is read first."""

    def check(self) -> None:
        """Refuse values out of range, before the model is loaded."""
        super().check()
        check_stops(self.stop)
        if self.batch_size < 1:
            raise UserError(f"--batch-size {self.batch_size}: must be at least 1")
        alone = dict(prompt=self.prompt, save_state=self.save_state, load_state=self.load_state)
        if self.prompts and (given := [name for name, value in alone.items() if value]):
            raise UserError(f"--{given[0].replace('_', '-')}: only for a single text, not with --prompts")
        if Path(self.save_state).is_dir() and self.save_state:
            raise UserError(f"--save-state {self.save_state}: is a folder; give a file")
        if self.out and not self.prompts:
            raise UserError(f"--out {self.out}: only with --prompts FILE; a single text goes to standard output")


def load_model(run: str, teacher: str, *, teacher_model: bool = False) -> runs.Teacher:
    """The model that a command line asks for: a run's student or teacher, or a teacher alone.

    Raises UserError where neither or both of `run` and `teacher` are given, and what opening them raises.
    """
    one_of(run, teacher)
    if teacher and teacher_model:
        raise UserError("--teacher-model: only with --run, it chooses the run's teacher")
    if not run:
        return runs.load_teacher(RunConfig(teacher=teacher))
    opened = runs.open_run(Path(run))
    if teacher_model:
        return runs.load_teacher(opened.config)
    return runs.Teacher(opened.student, jax.tree.map(jnp.asarray, opened.params()), opened.tokenizer())


def stop_tokens(tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end a text."""
    ids = {tokenizer.eos_token_id, convert.end_of_text_id(tokenizer)}
    return tuple(sorted(i for i in ids if i is not None))


def read_prompts(path: str) -> list[str]:
    """The prompts of a file: its lines, or the field "prompt" of each line of a .jsonl. Raises UserError."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(f"--prompts {path}: cannot be read ({reason})") from None
    numbered = [(n, line.removesuffix("\r")) for n, line in enumerate(lines, 1) if line.strip()]
    if path.endswith(".jsonl"):
        numbered = [(n, _prompt_of(line, f"--prompts {path}, line {n}")) for n, line in numbered]
    if not numbered:
        raise UserError(f"--prompts {path}: holds no prompt")
    return [prompt for _, prompt in numbered]


def _prompt_of(line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except ValueError:
        raise UserError(f"{where}: is no JSON") from None
    prompt = record.get("prompt") if isinstance(record, dict) else None
    if not isinstance(prompt, str) or not prompt:
        raise UserError(f'{where}: has no text "prompt"')
    return whole_text(prompt, where)


def continue_file(model: runs.Teacher, settings: Settings, prompts: Sequence[str], out: TextIO) -> None:
    """Write a line of JSON for each prompt, in their order, as soon as those before it are there too."""
    begin = convert.begin_ids(model.tokenizer)
    tokens = [begin + _encode(model.tokenizer, prompt) for prompt in prompts]
    longest = max(map(len, tokens)) + settings.max_new_tokens
    engine = Engine(
        model.config,
        model.params,
        slots=min(settings.batch_size, len(prompts)),
        room=-(-longest // PAD_TO) * PAD_TO,
        sampling=settings.sampling,
        seed=settings.seed,
        stop_ids=stop_tokens(model.tokenizer),
        stop=settings.stop,
        tokenizer=model.tokenizer,
        unroll=bool(settings.unroll),
    )
    shared = common_prefix([*tokens, min(tokens, key=len)[:-1]])
    if len(tokens) > 1 and len(shared) >= WORTH_REMEMBERING:
        engine.remember(shared)
    for prompt in tokens:
        engine.submit(prompt, settings.max_new_tokens)
    done: dict[int, Completion] = {}
    written = 0
    for piece in engine.stream():
        if piece.completion is not None:
            done[piece.number] = piece.completion
        while written in done:
            found = done.pop(written)
            record = {"prompt": prompts[written], "text": found.text, "tokens": found.tokens, "reason": found.reason}
            print(json.dumps(record, ensure_ascii=False), file=out, flush=True)
            written += 1


@contextlib.contextmanager
def _written(path: str) -> Iterator[TextIO]:
    """A file that appears when it is complete; standard output for no path."""
    if not path:
        yield sys.stdout
        return
    try:
        with draft(Path(path)) as part, part.open("w", encoding="utf-8") as file:
            yield file
    except OSError as error:
        raise UserError(f"--out {path}: cannot be written ({error.strerror})") from None


def _encode(tokenizer: Any, text: str) -> list[int]:
    """Tokens of what a text goes on with."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def continue_text(model: runs.Teacher, settings: Settings, prompt: str, out: TextIO) -> None:
    """Write the prompt and what follows, piece by piece; the session comes from a file and goes to one where asked."""
    params = serving_params(model.params, model.config, unroll=bool(settings.unroll))
    tokens = _encode(model.tokenizer, prompt)
    if settings.load_state:
        session = Session.load(settings.load_state, model.config, params)
    else:
        tokens = convert.begin_ids(model.tokenizer) + tokens
        room = -(-(len(tokens) + settings.max_new_tokens) // PAD_TO) * PAD_TO  # few sizes are compiled
        session = Session(model.config, params, seed=settings.seed, room=room)
    session.read(tokens)
    if session.logits is None:
        raise UserError("--prompt: it is empty; give at least one token")
    print(prompt, end="", file=out, flush=True)
    pieces = stream(
        session,
        model.tokenizer,
        max_new_tokens=settings.max_new_tokens,
        sampling=settings.sampling,
        stop_ids=stop_tokens(model.tokenizer),
        stop=settings.stop,
        before=tokens,
    )
    for piece in pieces:
        print(piece, end="", file=out, flush=True)
    print(file=out)
    if settings.save_state:
        session.save(settings.save_state)


def main() -> None:
    """Entry point of `python -m jaxlin.generate`."""
    settings = parse(Settings)
    settings.check()
    if settings.prompts:
        prompts = read_prompts(settings.prompts)
        model = settings.load()
        with _written(settings.out) as out:
            continue_file(model, settings, prompts, out)
        return
    prompt = settings.prompt
    if prompt is None:
        prompt = "" if settings.load_state else sys.stdin.read()
    if not prompt and not settings.load_state:
        raise UserError("the prompt is empty: give --prompt or text on standard input")
    whole_text(prompt, "standard input" if settings.prompt is None else "--prompt")
    continue_text(settings.load(), settings, prompt, sys.stdout)


if __name__ == "__main__":
    run_main(main)
