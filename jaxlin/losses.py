"""The distillation losses. Each is a sum over valid tokens divided by a count the caller gives.

The count is that of the whole step, so a loss does not depend on devices, packing or gradient accumulation.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxlin import sharding
from jaxlin.config import ModelConfig, Stage1Config, Stage2Config, Stage3Config
from jaxlin.model import project


def attention_output_loss(
    student: Float[Array, "B T D"],
    teacher: Float[Array, "B T D"],
    valid: Bool[Array, "B T"],
    count,
    config: Stage1Config,
) -> Array:
    """|a_S - a_T|^2 (paper, equation 1), averaged over tokens and, unless `width_reduction` is sum, over the width."""
    error = student.astype(jnp.float32) - teacher.astype(jnp.float32)
    error = jnp.where(valid[..., None], error, 0)
    width = error.shape[-1] if config.width_reduction == "mean" else 1
    return jnp.sum(error * error) / (count * width)


def hidden_state_loss(
    student: Float[Array, "B T D"],
    teacher: Float[Array, "B T D"],
    valid: Bool[Array, "B T"],
    count,
    config: Stage2Config,
) -> Array:
    """|h_S - h_T|_2 (paper, equation 3: not squared), averaged over tokens."""
    error = student.astype(jnp.float32) - teacher.astype(jnp.float32)
    squares = jnp.sum(error * error, axis=-1)
    if not config.squared:
        squares = jnp.sqrt(squares + 1e-12)  # finite slope where the two agree
    scale = error.shape[-1] ** -0.5 if config.scale == "rsqrt_width" else 1.0
    return scale * jnp.sum(jnp.where(valid, squares, 0)) / count


class Targets(NamedTuple):
    """What the logits of a batch are compared at: the next tokens, and where they and the teacher count."""

    labels: Int[Array, "B T"]
    valid: Bool[Array, "B T"]
    has_next: Bool[Array, "B T"]


def targets(tokens: Int[Array, "B T"], segment_ids: Int[Array, "B T"]) -> Targets:
    """Next tokens within each segment."""
    following = jnp.pad(segment_ids[:, 1:], ((0, 0), (0, 1)))
    valid = segment_ids != 0
    return Targets(jnp.pad(tokens[:, 1:], ((0, 0), (0, 1))), valid, valid & (following == segment_ids))


class LogitSums(NamedTuple):
    """Sums over tokens: KL(teacher || student), cross-entropy of both, agreement of their first choices."""

    kl: Array
    ce: Array
    teacher_ce: Array
    agree: Array


def logit_sums(
    student: Float[Array, "B T D"],
    teacher: Float[Array, "B T D"],
    student_kernel: Float[Array, "D V"],
    teacher_kernel: Float[Array, "D V"],
    at: Targets,
    config: ModelConfig,
    *,
    temperature: float = 1.0,
    chunk_tokens: int = 512,
) -> LogitSums:
    """Compare two models' next-token distributions from their final hidden states, a chunk of tokens at a time.

    Each device compares `chunk_tokens` of its own rows at a time. Neither model's [B, T, V] logits ever exist: those of
    a chunk are recomputed in the backward pass. The KL at temperature tau is multiplied by tau^2, which keeps its
    gradient's size (Hinton et al. 2015, arXiv 1503.02531, section 2.1).
    """
    sums = functools.partial(_logit_sums, config=config, temperature=temperature, chunk_tokens=chunk_tokens)
    return sharding.summed_over_rows(sums, (student, teacher, at), (student_kernel, teacher_kernel))


def _logit_sums(rows, kernels, *, config: ModelConfig, temperature: float, chunk_tokens: int) -> LogitSums:
    """The sums of these rows: (student's hidden states, teacher's, `Targets`), each [B, T, ...]."""
    student_kernel, teacher_kernel = kernels
    batch, length = rows[0].shape[:2]
    size = max(d for d in range(1, length + 1) if length % d == 0 and (d == 1 or d * batch <= max(chunk_tokens, batch)))

    def split(a):
        return jnp.moveaxis(a.reshape(batch, length // size, size, *a.shape[2:]), 1, 0)

    @jax.checkpoint
    def chunk(sums, xs):
        hidden_s, hidden_t, at = xs
        logits_s = project(hidden_s, student_kernel, config)
        logits_t = jax.lax.stop_gradient(project(hidden_t, teacher_kernel, config))
        log_s = jax.nn.log_softmax(logits_s / temperature)
        log_t = jax.nn.log_softmax(logits_t / temperature)
        kl = temperature**2 * jnp.sum(jnp.exp(log_t) * (log_t - log_s), axis=-1)

        def cross_entropy(logits):
            picked = jnp.take_along_axis(logits, at.labels[..., None], axis=-1)[..., 0]
            return jax.nn.logsumexp(logits, axis=-1) - picked

        def total(values, mask):
            return jnp.sum(jnp.where(mask, values, 0))

        return LogitSums(
            sums.kl + total(kl, at.valid),
            sums.ce + total(cross_entropy(logits_s), at.has_next),
            sums.teacher_ce + total(cross_entropy(logits_t), at.has_next),
            sums.agree + total(jnp.argmax(logits_s, -1) == jnp.argmax(logits_t, -1), at.valid),
        ), None

    zero = LogitSums(*(jnp.zeros((), jnp.float32),) * 4)
    return jax.lax.scan(chunk, zero, jax.tree.map(split, rows))[0]


def distillation_loss(sums: LogitSums, tokens, next_tokens, sequences, config: Stage3Config) -> Array:
    """CE + lambda KL (paper, equations 5 and 6); the authors' code sums the KL over a sequence."""
    kl = sums.kl / (tokens if config.kl_reduction == "token_mean" else sequences)
    return config.ce_weight * sums.ce / jnp.maximum(next_tokens, 1) + config.kl_weight * kl
