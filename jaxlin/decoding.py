"""Decoding: every row of a batch writes token after token, from a state that stays where it is."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlin.config import ModelConfig
from jaxlin.model import forward
from jaxlin.sampling import Sampling, choose, mark
from jaxlin.sharding import on_every_device

BLOCK = 16  # tokens decoded between two looks at what came out


class Carry(NamedTuple):
    """What decoding needs of each row: its last token, how many it has, its key, the tokens it holds, its state."""

    token: jax.Array  # [B]
    count: jax.Array  # [B]
    keys: jax.Array  # [B]
    seen: jax.Array | None  # [B, V], with a repetition penalty only
    state: Any


@jax.jit(static_argnums=0, donate_argnums=4)
def first_tokens(sampling: Sampling, logits, keys, seen, state) -> Carry:
    """After the prompts: the first token of each row is chosen."""
    count = jnp.zeros(logits.shape[0], jnp.uint32)
    token = choose(sampling, keys, count, logits, seen)
    return Carry(token, count + 1, keys, None if seen is None else mark(seen, token), state)


@jax.jit(static_argnums=(0, 1, 2), donate_argnums=4)
def decode(config: ModelConfig, sampling: Sampling, steps: int, params, carry: Any) -> tuple[jax.Array, Any]:
    """`steps` more tokens of each row, [B, steps], and the carry after them."""

    def step(carry: Carry, _):
        token, count, keys, seen, state = carry
        out = forward(config, params, token[:, None], state=state)
        assert out.logits is not None
        token = choose(sampling, keys, count, out.logits[:, 0], seen)
        seen = None if seen is None else mark(seen, token)
        return Carry(token, count + 1, keys, seen, out.state), token

    carry, tokens = jax.lax.scan(step, carry, length=steps)
    return on_every_device(tokens.T), carry


@jax.jit(donate_argnums=0)
def exchange(old: Any, new: Any, rows: jax.Array) -> Any:
    """A carry or state with the rows of `new` at the indices `rows`; those out of range are dropped."""

    def put(path: Any, a: jax.Array, b: jax.Array) -> jax.Array:
        return (a.at[:, rows] if _is_stacked(path) else a.at[rows]).set(b, mode="drop")

    return jax.tree.map_with_path(put, old, new)


@jax.jit
def rows_of(tree: Any, rows: jax.Array) -> Any:
    """These rows of a carry."""
    return jax.tree.map_with_path(lambda path, a: a[:, rows] if _is_stacked(path) else a[rows], tree)


def _is_stacked(path: Any) -> bool:
    """Whether an array of a carry or of a state has an axis of layers before that of rows."""
    return any(getattr(key, "key", None) == "layers" for key in path)
