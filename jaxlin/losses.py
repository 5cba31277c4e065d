"""The distillation losses. Each is a sum over valid tokens divided by a count the caller gives.

The count is that of the whole step, so a loss does not depend on devices, packing or gradient accumulation.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxlin import reductions, sharding
from jaxlin.config import ModelConfig, Stage1Config, Stage2Config, Stage3Config
from jaxlin.mixers.common import precision
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


def targets(
    tokens: Int[Array, "B T"], segment_ids: Int[Array, "B T"], learned: Bool[Array, "B T"] | None = None
) -> Targets:
    """Next tokens within each segment; where `learned` says which are to be predicted, nothing else counts."""
    following = jnp.pad(segment_ids[:, 1:], ((0, 0), (0, 1)))
    valid = segment_ids != 0
    labels, has_next = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1))), valid & (following == segment_ids)
    if learned is None:
        return Targets(labels, valid, has_next)
    predicted = has_next & jnp.pad(learned[:, 1:], ((0, 0), (0, 1)))
    return Targets(labels, predicted, predicted)


class LogitSums(NamedTuple):
    """Sums over tokens: KL(teacher || student), cross-entropy of both, agreement of their first choices.

    Without a teacher all but the student's cross-entropy are 0.
    """

    kl: Array
    ce: Array
    teacher_ce: Array
    agree: Array


class LossWeights(NamedTuple):
    """What stage 3's loss multiplies the sums over tokens by."""

    kl: Array
    ce: Array


def loss_weights(tokens, next_tokens, sequences, config: Stage3Config) -> LossWeights:
    """Those of CE + lambda KL (paper, equations 5 and 6); the authors' code sums the KL over a sequence."""
    kl = config.kl_weight / (tokens if config.kl_reduction == "token_mean" else sequences)
    return LossWeights(jnp.float32(kl), jnp.float32(config.ce_weight / jnp.maximum(next_tokens, 1)))


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

    Each device compares `chunk_tokens` of its own rows at a time, so neither model's [B, T, V] logits ever exist. The
    KL at temperature tau is multiplied by tau^2, which keeps its gradient's size (Hinton et al. 2015, arXiv 1503.02531,
    section 2.1). For values; what trains is `distillation_loss`.
    """
    how = _How(config, temperature, chunk_tokens)
    return _compare(how, (student, teacher, at), (student_kernel, teacher_kernel))[0]


class _How(NamedTuple):
    """The settings of a comparison that are known when it is compiled."""

    config: ModelConfig
    temperature: float
    chunk_tokens: int


def distillation_loss(
    student: Float[Array, "B T D"],
    teacher: Float[Array, "B T D"] | None,
    student_kernel: Float[Array, "D V"],
    teacher_kernel: Float[Array, "D V"] | None,
    at: Targets,
    weights: LossWeights,
    config: ModelConfig,
    *,
    temperature: float = 1.0,
    chunk_tokens: int = 512,
) -> tuple[Array, LogitSums]:
    """weights.kl KL + weights.ce CE, with the sums of `logit_sums` as metrics, through which no gradient flows.

    The teacher is a constant. Logits s (student) and t (teacher) exist once, a chunk of tokens at a time: where the
    loss is to be differentiated, the forward pass also computes the gradients of the student's hidden states h and head
    W, the head's summed over chunks in float32; the backward pass scales both (as Liger does, arXiv 2410.10989).
    Where the teacher is None, so is its kernel, and the loss is weights.ce CE.

        dL/ds = weights.kl tau (softmax(s / tau) - softmax(t / tau)) + weights.ce (softmax(s) - onehot(label))
        dL/dh = dL/ds W^T,  dL/dW = the sum over tokens of h^T dL/ds
    """
    how = _How(config, temperature, chunk_tokens)
    found: Any = _loss(how, student, student_kernel, (teacher, teacher_kernel, at), weights)
    loss, sums = found
    return loss, jax.lax.stop_gradient(sums)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(how: _How, student, student_kernel, constants, weights: LossWeights):
    teacher, teacher_kernel, at = constants
    sums, _, _ = _compare(how, (student, teacher, at), (student_kernel, teacher_kernel))
    return weights.kl * sums.kl + weights.ce * sums.ce, sums


def _loss_forward(how: _How, student, student_kernel, constants, weights: LossWeights):
    teacher, teacher_kernel, at = constants
    sums, for_student, for_kernel = _compare(how, (student, teacher, at), (student_kernel, teacher_kernel), weights)
    loss = weights.kl * sums.kl + weights.ce * sums.ce
    return (loss, sums), (*for_student, *for_kernel, sums, jnp.zeros((), student_kernel.dtype))


def _loss_backward(how: _How, saved, cotangents):
    del how
    for_student, for_kernel, sums, parameter = saved
    scale, _ = cotangents
    student, kernel = ((scale * a).astype(b.dtype) for a, b in ((for_student, for_student), (for_kernel, parameter)))
    return student, kernel, None, LossWeights(scale * sums.kl, scale * sums.ce)


_loss.defvjp(_loss_forward, _loss_backward)


def _compare(how: _How, rows, kernels, weights: LossWeights | None = None):
    """(sums, gradient of the student's hidden states, of its head), each in a tuple; gradients only with `weights`."""
    # Rounded to the dtype of the products before they are gathered, which halves what crosses the network.
    kernels = jax.tree.map(lambda kernel: kernel.astype(how.config.dtype), kernels)
    return sharding.over_tokens(functools.partial(_compare_rows, how), rows, (kernels, weights))


def _compare_rows(how: _How, rows, whole):
    """`_compare` for these rows: (student's hidden states, teacher's or None, `Targets`), each [B, T, ...]."""
    config, temperature, chunk_tokens = how
    (student_kernel, teacher_kernel), weights = whole
    batch, length = rows[0].shape[:2]
    size = max(d for d in range(1, length + 1) if length % d == 0 and (d == 1 or d * batch <= max(chunk_tokens, batch)))

    def split(a):  # [B, T, ...] -> [T / size, B size, ...]
        chunks = jnp.moveaxis(a.reshape(batch, length // size, size, *a.shape[2:]), 1, 0)
        return chunks.reshape(length // size, batch * size, *a.shape[2:])

    def join(a):
        chunks = a.reshape(length // size, batch, size, *a.shape[2:])
        return jnp.moveaxis(chunks, 0, 1).reshape(batch, length, *a.shape[2:])

    def chunk(carry, xs):
        sums, for_kernel = carry
        hidden_s, hidden_t, at = xs
        logits_s = project(hidden_s, student_kernel, config)
        logits_t = None if hidden_t is None else project(hidden_t, teacher_kernel, config)
        sums, slope = _compare_logits(sums, logits_s, logits_t, at, temperature, weights)
        if slope is None:
            return (sums, for_kernel), ()
        slope = slope.astype(config.dtype)
        multiply = functools.partial(jnp.einsum, precision=precision(config.dtype), preferred_element_type=jnp.float32)
        for_hidden = multiply("tv,dv->td", slope, student_kernel).astype(hidden_s.dtype)
        for_kernel = for_kernel + multiply("td,tv->dv", hidden_s.astype(config.dtype), slope)
        return (sums, for_kernel), for_hidden

    sums = LogitSums(*(jnp.zeros((), jnp.float32),) * 4)
    for_kernel: Any = () if weights is None else jnp.zeros(student_kernel.shape, jnp.float32)
    (sums, for_kernel), for_hidden = jax.lax.scan(chunk, (sums, for_kernel), jax.tree.map(split, rows))
    if weights is None:
        return sums, (), ()
    # A tied head transposes this next; XLA for CPUs turns that into a bfloat16 product that it cannot run.
    for_kernel = jax.lax.optimization_barrier(for_kernel)
    return sums, (join(for_hidden),), (for_kernel,)


def _compare_logits(
    sums: LogitSums,
    logits_s: Float[Array, "N V"],
    logits_t: Float[Array, "N V"] | None,
    at: Targets,
    temperature: float,
    weights: LossWeights | None,
) -> tuple[LogitSums, Float[Array, "N V"] | None]:
    """`sums` with those of these tokens, and with `weights` the loss's gradient with respect to the student's logits.

    Logits are read three times, both models' at once: for their largest, for sums over the vocabulary, for the
    gradient. With s and t less their largest, over tau, and Z the sums of their exponentials,

        KL = sum_v e^t (t - s) / Z_t + log(Z_s / Z_t)

    Where the two are close, the last is log(1 + sum_v (e^s - e^t) / Z_t): 0 for equal logits, though Z_s and Z_t were
    added up in another order.
    """
    student, *teacher = reductions.maxima(*(logits for logits in (logits_s, logits_t) if logits is not None))
    # A comparison, not an index: the vocabulary may be split over devices.
    label = at.labels[:, None] == jnp.arange(logits_s.shape[-1])

    def total(values, mask):
        return jnp.sum(jnp.where(mask, values, 0))

    s = logits_s - student.value[:, None]
    terms = {"z_s": jnp.exp(s), "label_s": jnp.where(label, s, 0)}
    if logits_t is not None:
        t = logits_t - teacher[0].value[:, None]
        soft_s, soft_t = s / temperature, t / temperature
        terms |= {"z_t": jnp.exp(t), "label_t": jnp.where(label, t, 0)}
        terms |= {
            "soft_z_s": jnp.exp(soft_s),
            "soft_z_t": jnp.exp(soft_t),
            "soft_more": jnp.exp(soft_s) - jnp.exp(soft_t),
            "cross": jnp.exp(soft_t) * (soft_t - soft_s),
        }
    found = {name: jnp.sum(term, axis=-1) for name, term in terms.items()}
    log_z = {name: jnp.log(found[name]) for name in found if "z_" in name}

    slope: Any = 0
    sums = sums._replace(ce=sums.ce + total(log_z["z_s"] - found["label_s"], at.has_next))
    if logits_t is not None:
        log_s, log_t, more = log_z["soft_z_s"], log_z["soft_z_t"], found["soft_more"] / found["soft_z_t"]
        log_ratio = jnp.where(jnp.abs(more) < 0.5, jnp.log1p(more), log_s - log_t)
        sums = sums._replace(
            kl=sums.kl + temperature**2 * total(found["cross"] / found["soft_z_t"] + log_ratio, at.valid),
            teacher_ce=sums.teacher_ce + total(log_z["z_t"] - found["label_t"], at.has_next),
            agree=sums.agree + total(student.index == teacher[0].index, at.valid),
        )
        if weights is not None:
            each = (temperature * weights.kl * at.valid)[:, None]
            slope = each * (jnp.exp(soft_s - log_s[:, None]) - jnp.exp(soft_t - log_t[:, None]))
    if weights is None:
        return sums, None
    return sums, slope + (weights.ce * at.has_next)[:, None] * (jnp.exp(s - log_z["z_s"][:, None]) - label)
