"""One text or conversation that goes on: what a model keeps of it, and the tokens that it adds.

What generation shares is here too: the first pass over a prompt, and the choice of the next token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax

from jaxlin.config import ModelConfig, UserError
from jaxlin.model import forward, head_kernel, init_state, project
from jaxlin.sharding import on_every_device
from jaxlin.student import is_new

PAD_TO = 32  # prompts are padded to a multiple of this, so that few lengths are compiled
PREFILL_CHUNK = 2048  # tokens of a prompt read in one call
ROOM = 1024  # tokens that a conversation's cache has place for at first


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 takes the likeliest, whatever top_k and top_p are."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise UserError(f"--temperature {self.temperature}: must be 0 (greedy) or more")
        if self.top_k < 0:
            raise UserError(f"--top-k {self.top_k}: must be 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p {self.top_p}: must be above 0 and at most 1 (all tokens)")


class Session:
    """One text, read and continued bit by bit; no token is read twice.

    Between calls it is a state: of constant size with linear-time mixers, a cache of keys and values that doubles when
    it is full with softmax attention. `length` counts the tokens in it; `logits` [1, V], float32, are those after the
    last one, None before the first.
    """

    def __init__(self, config: ModelConfig, params: Any, *, seed: int = 0, room: int = ROOM) -> None:
        """`params` as `serving_params` gives them; `room`: tokens that a cache has place for at first."""
        self.length = 0
        self.logits: jax.Array | None = None
        self._config, self._params = config, params
        self._state, self._room = init_state(config, 1, room), room
        self._keys = row_keys(seed, [0])
        self._drawn = 0  # tokens chosen so far: their numbers keep two turns from the same random numbers

    def read(self, tokens: Sequence[int]) -> None:
        """Continue the text with given tokens. Raises ValueError for ids outside the vocabulary, having read none."""
        if not tokens:
            return
        size = PAD_TO
        while size < len(tokens):  # powers of two: turns of a conversation are of any length, programs are few
            size *= 2
        padded = left_pad([tokens], self._config.vocab_size, size, PREFILL_CHUNK)
        self._make_room(len(tokens))
        self.logits, self._state = prefill(self._config, self._params, self._state, *padded, PREFILL_CHUNK)

    def stream(self, sampling: Sampling, max_new_tokens: int, stop_ids: Sequence[int] = ()) -> Iterator[int]:
        """New tokens, at most `max_new_tokens`, up to one in `stop_ids`, which is neither given out nor read.

        Wherever the caller stops to ask, every token that was given out has been read, and no other.
        """
        if self.logits is None:
            raise ValueError("nothing was read that could be continued")
        token = self._choose(sampling)
        for _ in range(max_new_tokens):
            value = int(token[0])
            if value in stop_ids:
                return
            self._make_room(1)
            self.logits, self._state = _read_token(self._config, self._params, self._state, token)
            token = self._choose(sampling)  # the device is at it while the caller shows the last one
            yield value

    def _choose(self, sampling: Sampling) -> jax.Array:
        number, self._drawn = self._drawn, self._drawn + 1
        return choose(sampling, self._keys, jnp.uint32(number), self.logits)

    def _make_room(self, count: int) -> None:
        """Before `count` more tokens: a larger cache, where there is one and it would overflow."""
        self.length += count
        if self.length <= self._room:
            return
        while self._room < self.length:
            self._room *= 2
        empty = init_state(self._config, 1, self._room)
        self._state = jax.tree.map(
            lambda old, new: old if old.shape == new.shape else lax.dynamic_update_slice(new, old, (0,) * old.ndim),
            self._state,
            empty,
        )


def serving_params(params: Any, config: ModelConfig) -> Any:
    """The parameters with every matrix that is only ever used in the compute dtype stored in it: the same results."""
    matrices = ("kernel", "bias", "embedding")
    cast = {p: jnp.asarray(a, config.dtype if p[-1] in matrices and not is_new(p) else None)
            for p, a in flatten_dict(params).items()}  # fmt: skip
    return unflatten_dict(cast)


def left_pad(
    prompts: Sequence[Sequence[int]], vocab_size: int, pad_to: int, chunk: int
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and segment ids [B, T]; 0 before each prompt, so that all of them end together."""
    if short := [i for i, prompt in enumerate(prompts) if len(prompt) == 0]:
        raise UserError(f"--prompt: prompt {short[0]} is empty; give at least one token")
    longest = max(map(len, prompts))
    unit = min(pad_to, chunk) if longest <= chunk else chunk
    length = -(-longest // unit) * unit
    tokens, segment_ids = np.zeros((2, len(prompts), length), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt) :] = prompt
        segment_ids[row, length - len(prompt) :] = 1
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        raise ValueError(f"prompts: ids {tokens.min()} to {tokens.max()} are not in a vocabulary of {vocab_size}")
    return tokens, segment_ids


def prefill(config: ModelConfig, params, state, tokens, segment_ids, chunk: int):
    """Read tokens [B, T] into `state`, `chunk` at a time; the logits after the last one [B, V], and the state."""
    logits = None
    for start in range(0, tokens.shape[1], chunk):
        part = slice(start, start + chunk)  # all are of one size
        logits, state = _read(config, params, state, tokens[:, part], segment_ids[:, part])
    return logits, state


@jax.jit(static_argnums=0, donate_argnums=2)
def _read(config: ModelConfig, params, state, tokens, segment_ids):
    out = forward(config, params, tokens, segment_ids=segment_ids, state=state, logits=False)
    return on_every_device(project(out.hidden[:, -1], head_kernel(params), config)), out.state


@jax.jit(static_argnums=0, donate_argnums=2)
def _read_token(config: ModelConfig, params, state, token):
    out = forward(config, params, token[:, None], state=state)
    assert out.logits is not None
    return on_every_device(out.logits[:, 0]), out.state


def row_keys(seed: int, streams: Sequence[int]) -> jax.Array:
    """The key of each row's random numbers: stream `streams[row]` (32 bits) of those that `seed` begins."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), np.asarray(streams, np.uint32))


@jax.jit(static_argnums=0)
def choose(sampling: Sampling, keys, number, logits):
    """The next token of each row, [B], from logits [B, V]; top_k narrows first, then top_p among those left."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    scores = logits / sampling.temperature
    vocabulary = scores.shape[-1]
    narrow = sampling.top_k or sampling.top_p < 1
    if narrow:
        scores, tokens = jax.lax.top_k(scores, min(sampling.top_k or vocabulary, vocabulary))
        before = jnp.cumsum(jax.nn.softmax(scores), axis=-1) - jax.nn.softmax(scores)
        # The likeliest token always stays: nothing is before it.
        scores = jnp.where(before < sampling.top_p, scores, -jnp.inf)
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, number)
    choice = jax.vmap(jax.random.categorical)(keys, scores)
    if narrow:
        choice = jnp.take_along_axis(tokens, choice[:, None], axis=-1)[:, 0]
    return choice.astype(jnp.int32)
