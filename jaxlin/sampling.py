"""The choice of the next token: which tokens may be chosen, and with what probability.

Definitions and order are those of transformers' logits processors (GenerationMixin._get_logits_processor, release 5):
repetition penalty, temperature, top-k, top-p, min-p; each works on what the one before has left, renormalised.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxlin.config import UserError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 takes the likeliest, whatever top_k, top_p and min_p are.

    Raises UserError for values out of range, by the name of the flag.
    """

    temperature: float = 0.0
    """Scores are divided by it."""
    top_k: int = 0
    """Choose among this many likeliest tokens; 0 means all."""
    top_p: float = 1.0
    """Choose among the likeliest tokens that together have this probability (Holtzman 2019, arXiv 1904.09751)."""
    min_p: float = 0.0
    """Choose among tokens of at least this share of the likeliest one's probability (Nguyen 2024, arXiv 2407.01082)."""
    repetition_penalty: float = 1.0
    """Positive scores of tokens in the text so far, prompt included, are divided by it, negative ones multiplied.

    Keskar et al. 2019, arXiv 1909.05858, section 4.1, with the negative ones as transformers has them.
    """

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise UserError(f"--temperature {self.temperature}: must be 0 (greedy) or more, and finite")
        if self.top_k < 0:
            raise UserError(f"--top-k {self.top_k}: must be 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p {self.top_p}: must be above 0 and at most 1 (all tokens)")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"--min-p {self.min_p}: must be from 0 (all tokens) to 1")
        if not (self.repetition_penalty > 0 and math.isfinite(self.repetition_penalty)):
            raise UserError(f"--repetition-penalty {self.repetition_penalty}: must be above 0 (1 is none), and finite")

    @property
    def penalizes(self) -> bool:
        """Whether the choice depends on which tokens were there before."""
        return self.repetition_penalty != 1


GREEDY = Sampling()


def row_keys(seed: int, streams: Sequence[int]) -> jax.Array:
    """The key of each row's random numbers: stream `streams[row]` (32 bits) of those that `seed` begins."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), np.asarray(streams, np.uint32))


def tokens_seen(texts: Sequence[Iterable[int]], vocab_size: int) -> np.ndarray:
    """Which tokens each text holds, [B, V]."""
    seen = np.zeros((len(texts), vocab_size), bool)
    for row, tokens in enumerate(texts):
        seen[row, np.fromiter(tokens, np.int64)] = True
    return seen


@jax.jit(static_argnums=0)
def choose(
    sampling: Sampling,
    keys: jax.Array,
    numbers: Int[Array, " B"],
    logits: Float[Array, "B V"],
    seen: Bool[Array, "B V"] | None = None,
) -> Int[Array, " B"]:
    """The next token of each row. Random numbers follow from a row's key and the number of its token alone.

    `seen`: the tokens that the repetition penalty concerns; see `tokens_seen`.
    """
    if sampling.penalizes:
        assert seen is not None
        penalty = sampling.repetition_penalty
        logits = jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    scores = logits / sampling.temperature
    vocabulary = scores.shape[-1]
    sort = sampling.top_k or sampling.top_p < 1
    if sort:
        scores, tokens = jax.lax.top_k(scores, min(sampling.top_k or vocabulary, vocabulary))
        probabilities = jax.nn.softmax(scores)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        # The likeliest token always stays: nothing is before it.
        scores = jnp.where(before < sampling.top_p, scores, -jnp.inf)
    if sampling.min_p:
        least = jnp.max(scores, axis=-1, keepdims=True) + math.log(sampling.min_p)
        scores = jnp.where(scores >= least, scores, -jnp.inf)
    keys = jax.vmap(jax.random.fold_in)(keys, numbers)
    choice = jax.vmap(jax.random.categorical)(keys, scores)
    if sort:
        choice = jnp.take_along_axis(tokens, choice[:, None], axis=-1)[:, 0]
    return choice.astype(jnp.int32)


def mark(seen: Bool[Array, "B V"], token: Int[Array, " B"]) -> Bool[Array, "B V"]:
    """`seen`, and these tokens."""
    return seen.at[jnp.arange(seen.shape[0]), token].set(True)
