"""Effective memory: after how many tokens what was written at one has fallen below 1/e.

Between writing and reading, a state is multiplied by what the gates let through and, with the delta rule, by what later
keys do not overwrite. Both are measured on real text, from tokens all over a sequence's first half:

gates: tokens until the product of the decays falls below 1/e, channel by channel where gates are vectors;
writes: tokens until |P k| falls below 1/e of |k|, where P is the product of the transitions (I - beta k k^T) diag(e^g)
of the tokens after the one with key k. That is what is left of its write k v^T, whatever v. Without beta and with one
gate a head both are the same; without gates the first is infinite, and without beta too, both.

Times are interpolated within a token, so that a constant gate e^g gives 1/|g| exactly. Where the window ends before the
fall, the rate until there is continued. What normalisers do (linear attention's sum, the mLSTM's n) is not counted:
they divide all that is remembered by the same number.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int


@jax.jit(static_argnums=4)
def lengths(
    k: Float[Array, "R B T H K"],
    g: Float[Array, "R B T H"] | Float[Array, "R B T H K"] | None,
    beta: Float[Array, "R B T H"] | None,
    starts: Int[Array, " A"],
    horizon: int,
) -> dict[str, Array]:
    """Memory in tokens from each of `starts`, {gates: [A, R, B, H] or [A, R, B, H, K], writes: [A, R, B, H]}.

    Each start has `horizon` tokens after it in the T.
    """

    def after(a: Array, start: Array) -> Array:
        return jnp.moveaxis(lax.dynamic_slice_in_dim(a, start + 1, horizon, axis=2), 2, 0)

    def from_one(start: Array) -> dict[str, Array]:
        key = jnp.take(k, start, axis=2)
        decay = None if g is None else after(g, start)
        spent = jnp.zeros((horizon, *key.shape[:-1])) if decay is None else -jnp.cumsum(decay, axis=0)
        if beta is None and (decay is None or decay.ndim == k.ndim - 1):  # every channel of a key alike
            return {"gates": first_passage(spent), "writes": first_passage(spent)}
        left = remaining(key, after(k, start), decay, None if beta is None else after(beta, start))
        return {"gates": first_passage(spent), "writes": first_passage(-jnp.log(jnp.maximum(left, 1e-30)))}

    return lax.map(from_one, starts)


def remaining(
    key: Float[Array, "R B H K"],
    k: Float[Array, "N R B H K"],
    g: Float[Array, "N R B H"] | Float[Array, "N R B H K"] | None,
    beta: Float[Array, "N R B H"] | None,
) -> Float[Array, "N R B H"]:
    """What is left of `key`, |P_n key| / |key|, after each of the N tokens that follow it."""

    def step(trace, token):
        k, g, beta = token
        if g is not None:
            trace = trace * jnp.exp(g if g.ndim == trace.ndim else g[..., None])
        if beta is not None:
            trace = trace - (beta * jnp.sum(k * trace, axis=-1))[..., None] * k
        return trace, jnp.linalg.norm(trace, axis=-1)

    start = key / jnp.maximum(jnp.linalg.norm(key, axis=-1, keepdims=True), 1e-30)
    return lax.scan(step, start, (k, g, beta))[1]


def first_passage(spent: Float[Array, "N ..."]) -> Float[Array, " ..."]:
    """When `spent`, in nats after 1 to N tokens and never falling, reaches 1; infinity where it stays 0."""
    last = spent[-1]
    whole = jnp.sum(spent < 1, axis=0)  # tokens after which it has not
    padded = jnp.concatenate([jnp.zeros_like(spent[:1]), spent])
    before, upto = (jnp.take_along_axis(padded, jnp.minimum(whole + i, len(spent))[None], axis=0)[0] for i in (0, 1))
    inside = whole + (1 - before) / jnp.where(last < 1, 1, upto - before)
    beyond = len(spent) / jnp.where(last > 0, last, 1)
    return jnp.where(last >= 1, inside, jnp.where(last > 0, beyond, jnp.inf))
