"""One text or conversation that goes on: what a model keeps of it, and the tokens that it adds.

What generation shares is here too: parameters as they are served, and the first pass over prompts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax

from jaxlin import session_file
from jaxlin.config import ModelConfig
from jaxlin.model import forward, head_kernel, init_state, layers_apart, project
from jaxlin.sampling import Sampling, choose, mark, row_keys
from jaxlin.sharding import on_every_device
from jaxlin.student import is_new

PAD_TO = 32  # prompts are padded to this times a power of two, so that few lengths are compiled
PREFILL_CHUNK = 2048  # tokens of a prompt read in one call
ROOM = 1024  # tokens that a conversation's cache has place for at first


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
        self._seen = np.zeros((1, config.vocab_size), bool)  # what was read, for the repetition penalty

    def read(self, tokens: Sequence[int]) -> None:
        """Continue the text with given tokens. Raises ValueError for ids outside the vocabulary, having read none."""
        if not tokens:
            return
        padded = left_pad([tokens], self._config.vocab_size, PAD_TO, PREFILL_CHUNK)
        fresh = self.length == 0
        self._make_room(len(tokens))
        self.logits, self._state = prefill(self._config, self._params, self._state, *padded, PREFILL_CHUNK, fresh)
        self._seen[0, list(tokens)] = True

    def stream(self, sampling: Sampling, max_new_tokens: int, stop_ids: Sequence[int] = ()) -> Iterator[int]:
        """New tokens, at most `max_new_tokens`, up to one in `stop_ids`, which is neither given out nor read.

        Wherever the caller stops to ask, every token that was given out has been read, and no other.
        """
        if self.logits is None:
            raise ValueError("nothing was read that could be continued")
        seen = jnp.asarray(self._seen) if sampling.penalizes else None
        token = self._choose(sampling, seen)
        for _ in range(max_new_tokens):
            value = int(token[0])
            if value in stop_ids:
                return
            self._make_room(1)
            self.logits, self._state = _read_token(self._config, self._params, self._state, token)
            self._seen[0, value] = True
            seen = None if seen is None else mark(seen, token)
            token = self._choose(sampling, seen)  # the device is at it while the caller shows the last one
            yield value

    def save(self, path: str | Path) -> None:
        """Write the session to a file, whole or not at all; `load` continues it bit for bit.

        Raises UserError where it cannot be written.
        """
        held = {"keys": jax.random.key_data(self._keys), "seen": np.packbits(self._seen)}
        held |= {} if self.logits is None else {"logits": self.logits}
        numbers = {"length": self.length, "room": self._room, "drawn": self._drawn}
        session_file.write(Path(path), self._config, self._params, numbers, {**held, "state": self._state})

    @classmethod
    def load(cls, path: str | Path, config: ModelConfig, params: Any) -> Session:
        """The session that `save` wrote, of the same model; `params` as for a new one.

        Raises UserError where there is none, where it is damaged, and where another model or other parameters wrote it.
        """
        numbers, held = session_file.read(Path(path), config, params)
        session = cls(config, params, room=numbers["room"])
        session.length, session._drawn = numbers["length"], numbers["drawn"]
        session._state = jax.tree.map_with_path(
            lambda path, empty: jnp.asarray(held[f"state/{session_file.name(path)}"].view(empty.dtype)), session._state
        )
        session._keys = jax.random.wrap_key_data(jnp.asarray(held["keys"]))
        session._seen = np.unpackbits(held["seen"], count=config.vocab_size).astype(bool)[None]
        session.logits = jnp.asarray(held["logits"]) if "logits" in held else None
        return session

    def _choose(self, sampling: Sampling, seen: jax.Array | None) -> jax.Array:
        number, self._drawn = self._drawn, self._drawn + 1
        return choose(sampling, self._keys, np.array([number], np.uint32), self.logits, seen)

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


def serving_params(params: Any, config: ModelConfig, *, unroll: bool = False) -> Any:
    """The parameters with every matrix that is only ever used in the compute dtype stored in it: the same results.

    With `unroll` each layer's are apart, and programs that read them have no loop over layers: faster to run, in small
    batches above all, and longer to compile.
    """
    matrices = ("kernel", "bias", "embedding")
    cast = {p: jnp.asarray(a, config.dtype if p[-1] in matrices and not is_new(p) else None)
            for p, a in flatten_dict(params).items()}  # fmt: skip
    served = unflatten_dict(cast)
    return layers_apart(served) if unroll else served


def left_pad(
    prompts: Sequence[Sequence[int]], vocab_size: int, pad_to: int, chunk: int
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and segment ids [B, T]; 0 before each prompt, so that all of them end together.

    T is `pad_to` times a power of two, at most `chunk`, or a multiple of `chunk`: few lengths are compiled. Raises
    ValueError for ids outside the vocabulary.
    """
    longest = max(map(len, prompts))
    length = min(pad_to, chunk)
    while length < min(longest, chunk):
        length = min(2 * length, chunk)
    length *= -(-longest // length) or 1
    tokens, segment_ids = np.zeros((2, len(prompts), length), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt) :] = prompt
        segment_ids[row, length - len(prompt) :] = 1
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        raise ValueError(f"prompts: ids {tokens.min()} to {tokens.max()} are not in a vocabulary of {vocab_size}")
    return tokens, segment_ids


def prefill(config: ModelConfig, params, state, tokens, segment_ids, chunk: int, fresh: bool):
    """Read tokens [B, T] into `state`, `chunk` at a time; the logits after the last one [B, V], and the state.

    `fresh`: the state is that of `init_state`. `segment_ids` as `left_pad` gives them; None where nothing is padding.
    """
    logits = None
    for start in range(0, tokens.shape[1], chunk):
        part = slice(start, start + chunk)  # all are of one size
        ids = None if segment_ids is None else segment_ids[:, part]
        if ids is not None and tokens.shape[1] > chunk and ids.all():
            ids = None  # nothing has to be stepped over: convolutions are quicker
        logits, state = _read(config, fresh and start == 0, params, state, tokens[:, part], ids)
    assert logits is not None
    return logits, state


@jax.jit(static_argnums=(0, 1), donate_argnums=3)
def _read(config: ModelConfig, fresh: bool, params, state, tokens, segment_ids):
    out = forward(config, params, tokens, segment_ids=segment_ids, state=state, logits=False, fresh=fresh)
    return on_every_device(project(out.hidden[:, -1], head_kernel(params), config)), out.state


@jax.jit(static_argnums=0, donate_argnums=2)
def _read_token(config: ModelConfig, params, state, token):
    out = forward(config, params, token[:, None], state=state)
    assert out.logits is not None
    return on_every_device(out.logits[:, 0]), out.state
