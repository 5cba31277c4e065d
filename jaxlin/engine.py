"""Many prompts through a fixed number of slots: where a sequence ends, the next one in the queue takes its place.

All slots decode together, BLOCK tokens a call, in states of constant size. A prompt is read beside the others that find
a slot at the same time, and its state is put at its slot's index; what stands beside a sequence does not change it.
Softmax attention's cache has room for `room` tokens a slot, all of which a step reads: longer sequences are refused.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlin.config import ModelConfig, UserError
from jaxlin.decoding import BLOCK, Carry, decode, exchange, first_tokens, rows_of
from jaxlin.detokenizer import TextUntil, check_stops
from jaxlin.model import init_state
from jaxlin.prefix_cache import PrefixCache
from jaxlin.sampling import GREEDY, Sampling, row_keys, tokens_seen
from jaxlin.session import PAD_TO, PREFILL_CHUNK, left_pad, prefill, serving_params


@dataclass(frozen=True)
class Completion:
    """How a prompt was continued.

    `tokens`: up to a stop token or string, without it; where a stop string begins inside a token, without that token.
    `text`: all before the stop string, a part of such a token included; empty where the engine has no tokenizer.
    """

    tokens: list[int]
    text: str
    reason: Literal["stop", "length"]


class Piece(NamedTuple):
    """What is new in the continuation of prompt `number`; with `completion`, it is the last piece."""

    number: int
    tokens: list[int]
    text: str
    completion: Completion | None


class Engine:
    """Continues prompts as they are submitted. See the module's docstring.

    Args:
        config, params: the model.
        slots: sequences that decode together.
        room: tokens of prompt and continuation that a cache of softmax attention has place for, in each slot.
        sampling, seed: how tokens are chosen. Prompt number n draws from stream n of the seed's random numbers.
        stop_ids: tokens that end a sequence.
        stop: texts that end a sequence; they need `tokenizer`.
        tokenizer: with it, pieces and completions have text.
        finished: asked now and then whether a continuation, so far, may end; what it has by then is kept.
        pad_to, prefill_chunk: see `left_pad`; longer prompts are read in such chunks.
        prefixes: the states of `remember`.
        unroll: see `serving_params`.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Any,
        *,
        slots: int,
        room: int = 2048,
        sampling: Sampling = GREEDY,
        seed: int = 0,
        stop_ids: Sequence[int] = (),
        stop: Sequence[str] = (),
        tokenizer: Any = None,
        finished: Callable[[list[int]], bool] | None = None,
        pad_to: int = PAD_TO,
        prefill_chunk: int = PREFILL_CHUNK,
        prefixes: PrefixCache | None = None,
        unroll: bool = False,
    ) -> None:
        for name, value in dict(slots=slots, room=room, pad_to=pad_to, prefill_chunk=prefill_chunk).items():
            if value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        check_stops(stop)
        if stop and tokenizer is None:
            raise ValueError("stop: stop strings need a tokenizer")
        self._config, self._params = config, serving_params(params, config, unroll=unroll)
        self._room = room if "softmax" in config.mixer else None
        self._sampling, self._seed = sampling, seed
        self._ends = _Ends(frozenset(stop_ids), tuple(stop), tokenizer, finished)
        self._padding = pad_to, prefill_chunk
        self._prefixes = PrefixCache() if prefixes is None else prefixes
        self._rows: list[_Request | None] = [None] * slots
        self._waiting: deque[_Request] = deque()
        self._submitted = 0
        self._carry: Carry | None = None
        self._ahead: _Block | None = None

    def submit(self, prompt: Sequence[int], max_new_tokens: int, stream: int | None = None) -> int:
        """Queue a prompt of token ids; the number that its pieces have. It draws random numbers `stream`, or its own.

        Raises UserError for an empty prompt, a budget below 1 and a sequence that has no room in a cache; ValueError
        for ids outside the vocabulary.
        """
        number, size = self._submitted, len(prompt) + max_new_tokens
        check_budget(max_new_tokens)
        if not len(prompt):
            raise UserError(f"--prompt: prompt {number} is empty; give at least one token")
        if self._room is not None and size > self._room:
            raise UserError(f"--prompt: prompt {number} and its continuation have {size} tokens, room is {self._room}")
        if min(prompt) < 0 or max(prompt) >= self._config.vocab_size:
            low, high, most = min(prompt), max(prompt), self._config.vocab_size
            raise ValueError(f"prompt {number}: ids {low} to {high} are not in a vocabulary of {most}")
        stream = number if stream is None else stream
        self._waiting.append(_Request(number, list(prompt), max_new_tokens, stream, self._ends))
        self._submitted += 1
        return number

    def stream(self) -> Iterator[Piece]:
        """Pieces of all continuations, as they come, until the queue is empty; more may be submitted meanwhile."""
        while self._waiting or any(self._rows):
            yield from self._admit()
            if any(self._rows):
                yield from self._deliver(self._next_block())

    def run(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, streams: Sequence[int] | None = None
    ) -> list[Completion]:
        """The continuations of `prompts`, in their order. `streams` as in `submit`, by default 0, 1, ..."""
        streams = range(len(prompts)) if streams is None else streams
        numbers = [self.submit(p, max_new_tokens, s) for p, s in zip(prompts, streams, strict=True)]
        found = {piece.number: piece.completion for piece in self.stream() if piece.completion is not None}
        return [found[number] for number in numbers]

    def remember(self, prefix: Sequence[int]) -> None:
        """Read `prefix` now, and keep its state: prompts that begin with it are read from there.

        The longest such prefix counts. Results are the same up to rounding. Raises UserError for a state that is larger
        than all that may be kept.
        """
        if not len(prefix):
            raise UserError("remember: the prefix is empty; give at least one token")
        tokens, segment_ids = left_pad([prefix], self._config.vocab_size, *self._padding)
        state = init_state(self._config, 1, self._room or 1)
        _, chunk = self._padding
        _, state = prefill(self._config, self._params, state, tokens, segment_ids, chunk, fresh=True)
        self._prefixes.put(prefix, state)

    def _admit(self) -> Iterator[Piece]:
        """Give free slots to those who wait, and their first tokens."""
        while self._waiting and (free := [i for i, request in enumerate(self._rows) if request is None]):
            group = [self._waiting.popleft() for _ in range(min(len(free), len(self._waiting)))]
            slots = free[: len(group)]
            tokens = self._prefill(group, slots)
            for slot, request in zip(slots, group, strict=True):
                self._rows[slot] = request
            yield from self._deliver(_Block(dict(zip(slots, group, strict=True)), tokens[:, None], by_slot=False))

    def _prefill(self, group: Sequence[_Request], slots: Sequence[int]) -> jax.Array:
        """Read the prompts of `group` into `slots`; the first token of each row read."""
        size = min(1 << (len(group) - 1).bit_length(), len(self._rows))  # few are compiled
        blank = size - len(group)
        known = [self._prefixes.longest(request.prompt) for request in group]
        rests = [request.prompt[n:] for request, (n, _) in zip(group, known, strict=True)]
        tokens, segment_ids = left_pad([*rests, *[[]] * blank], self._config.vocab_size, *self._padding)
        if not any(self._rows):
            self._carry = None  # its memory, before the next one's is asked for
        state = init_state(self._config, size, self._room or 1)
        for row, (length, prefix) in enumerate(known):
            if length:
                state = exchange(state, prefix, np.array([row]))
        fresh, (_, chunk) = not any(length for length, _ in known), self._padding
        logits, state = prefill(self._config, self._params, state, tokens, segment_ids, chunk, fresh)
        keys = row_keys(self._seed, [*(request.stream for request in group), *[0] * blank])
        seen = None
        if self._sampling.penalizes:
            seen = jnp.asarray(tokens_seen([*(r.prompt for r in group), *[[]] * blank], self._config.vocab_size))
        carry = first_tokens(self._sampling, logits, keys, seen, state)
        if any(self._rows):
            self._carry = exchange(self._carry, carry, np.array([*slots, *[len(self._rows)] * blank]))
        else:  # the group has the first slots, and it does not matter what the others hold
            self._carry = carry if size == len(self._rows) else rows_of(carry, np.arange(len(self._rows)) % size)
        return carry.token

    def _next_block(self) -> _Block:
        """The next tokens of all slots.

        Where nobody waits the one after it is already being computed, so the device never waits for the caller. Where
        somebody does, slots that have become free are first given away.
        """
        block = self._ahead or self._decode()
        more = any(request is not None and request.left > BLOCK for request in self._rows)
        self._ahead = self._decode() if more and not self._waiting else None
        return block

    def _decode(self) -> _Block:
        live = {slot: request for slot, request in enumerate(self._rows) if request is not None}
        tokens, self._carry = decode(self._config, self._sampling, BLOCK, self._params, self._carry)
        return _Block(live, tokens, by_slot=True)

    def _deliver(self, block: _Block) -> list[Piece]:
        """Hand a block's tokens to their sequences; slots of those that end become free."""
        tokens, pieces = np.asarray(block.tokens), []
        for row, (slot, request) in enumerate(block.requests.items()):
            if request.reason is None:  # else it ended before, in a block that was on its way
                pieces.append(request.add(tokens[slot if block.by_slot else row].tolist()))
                if request.reason is not None:
                    self._rows[slot] = None
        return pieces


class _Block(NamedTuple):
    """Tokens [B, n] on their way, and who had which slot when they were computed; rows are slots, or in their order."""

    requests: Mapping[int, _Request]
    tokens: jax.Array
    by_slot: bool


class _Ends(NamedTuple):
    """What ends a sequence."""

    ids: frozenset[int]
    strings: tuple[str, ...]
    tokenizer: Any
    finished: Callable[[list[int]], bool] | None


class _Request:
    """A prompt, and its continuation so far."""

    def __init__(self, number: int, prompt: list[int], most: int, stream: int, ends: _Ends) -> None:
        self.number, self.prompt, self.stream = number, prompt, stream
        self.reason: Literal["stop", "length"] | None = None
        self._most, self._ends = most, ends
        self._tokens: list[int] = []
        self._given = 0
        self._text = None if ends.tokenizer is None else TextUntil(ends.tokenizer, ends.strings, prompt)

    @property
    def left(self) -> int:
        """Tokens that may still come."""
        return self._most - len(self._tokens)

    def add(self, tokens: Sequence[int]) -> Piece:
        """What is new with these tokens, of which those after an end do not count."""
        piece = ""
        for token in tokens:
            if token in self._ends.ids:
                self.reason = "stop"
                break
            self._tokens.append(token)
            if self._text is not None:
                piece += self._text.push(token)
                if self._text.stopped:
                    self.reason = "stop"
                    break
            if not self.left:
                self.reason = "length"
                break
        if self.reason is None and self._ends.finished is not None and self._ends.finished(self._tokens):
            self.reason = "stop"
        kept = len(self._tokens)
        if self._text is not None:
            if self.reason is not None:
                piece += self._text.flush()
                self.reason = "stop" if self._text.stopped else self.reason
            kept = self._text.kept
        new, self._given = self._tokens[self._given : kept], kept
        completion = None
        if self.reason is not None:
            text = "" if self._text is None else self._text.text
            completion = Completion(self._tokens[:kept], text, self.reason)
        return Piece(self.number, new, piece, completion)


def check_budget(max_new_tokens: int) -> None:
    """Refuse to write less than a token."""
    if max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {max_new_tokens}: must be at least 1")
