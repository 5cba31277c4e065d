"""AdamW or Muon as the recipe wants them: clipping per layer, two groups of learning rates, selective decay."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import path_aware_map
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from jaxlin.config import StageConfig
from jaxlin.distill import layer_weights
from jaxlin.student import Path, is_new

MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")


def make_optimizer(stage: StageConfig, steps: int, layers: int, period: int) -> optax.GradientTransformation:
    """The stage's optimizer, for the parameters it trains; gradients come accumulated, not clipped."""
    optimizer = _optimizer(stage, steps, layers, period)
    return skip_bad_steps(optimizer, stage.spike_factor) if stage.on_bad_step == "skip" else optimizer


def _optimizer(stage: StageConfig, steps: int, layers: int, period: int) -> optax.GradientTransformation:
    clip = clip_by_layer(stage.clip) if stage.clip_per_layer else optax.clip_by_global_norm(stage.clip)
    aligned = (layer_weights(stage, layers) > 0).reshape(-1, period)
    return optax.chain(
        clip if stage.clip else optax.identity(),
        _muon(stage) if stage.optimizer == "muon" else optax.scale_by_adam(*stage.betas, eps=stage.eps),
        optax.add_decayed_weights(stage.weight_decay, mask=_decay_mask(stage.decayed)),
        _scale_by_path(lambda path: stage.lr_new if is_new(path) else stage.lr),
        optax.scale_by_schedule(lambda count: -schedule(stage, steps)(count)),
        only_layers(aligned) if stage.layers else optax.identity(),
    )


def _muon(stage: StageConfig) -> optax.GradientTransformation:
    """Muon for the projections inside layers, Adam for the rest: embeddings, head, norms, gates, biases, new matrices.

    The momentum of each layer's matrix, [inputs, outputs], is brought near to the orthogonal matrix of its directions
    (Jordan et al. 2024, Newton-Schulz) and scaled to 0.2 sqrt(max(inputs, outputs)), the size of AdamW's updates, so
    that both go by one learning rate (Liu et al. 2025, arXiv 2502.16982, equation 4).
    """

    def chosen(path: Path, _: Any = None) -> bool:
        return path[0] == "layers" and path[-1] == "kernel" and path[-2] in MATRICES

    def axes(path: Path, g: Any) -> Any:  # [layers, inputs, outputs], of which heads are two axes
        if not chosen(path):
            return g
        first = g.ndim - 1 if path[-2] == "o_proj" else 2
        return MuonDimensionNumbers(tuple(range(1, first)), tuple(range(first, g.ndim)))

    def sized(path: Path, g: Any) -> Any:
        if not chosen(path):
            return g
        return 0.2 * math.sqrt(max(math.prod(g.shape[i] for i in side) for side in axes(path, g))) * g

    def resized(updates: Any, params: Any) -> Any:
        del params
        return path_aware_map(sized, updates)

    dimensions: Any = functools.partial(path_aware_map, axes)
    muon = scale_by_muon(beta=stage.betas[0], eps=stage.eps, weight_dimension_numbers=dimensions)
    adam = optax.scale_by_adam(*stage.betas, eps=stage.eps)
    return optax.chain(
        optax.masked(muon, functools.partial(path_aware_map, chosen)),
        optax.stateless(resized),
        optax.masked(adam, functools.partial(path_aware_map, lambda path, _: not chosen(path))),
    )


def schedule(stage: StageConfig, steps: int) -> Callable[[Any], Any]:
    """Learning rate at a step (from 0), as a fraction of its peak: linear warm-up, then the stage's shape."""
    warmup = round(stage.warmup * steps)
    rest = max(1, steps - warmup)
    if stage.schedule == "cosine":
        shape = optax.cosine_decay_schedule(1.0, rest, stage.lr_min)
    elif stage.schedule == "linear":
        shape = optax.linear_schedule(1.0, stage.lr_min, rest)
    elif stage.schedule == "wsd":
        decay = max(1, round(stage.decay * steps))
        stable = round(stage.stable * steps) if stage.stable else max(0, rest - decay)
        shape = optax.linear_schedule(1.0, stage.lr_min, decay, transition_begin=stable)
    else:
        shape = optax.constant_schedule(1.0)

    def at(step):
        # The first step already moves: (step + 1) / warmup.
        ramp = jnp.minimum(1.0, (step + 1) / max(1, warmup))
        return ramp * shape(jnp.maximum(step - warmup, 0))

    return at


def _decay_mask(decayed: str) -> Callable[[Any], Any]:
    return lambda params: path_aware_map(decay_rule(decayed), params)


def decay_rule(decayed: str) -> Callable[[Path, Any], bool]:
    """Which parameters weight decay acts on, by path."""

    def rule(path: Path, _: Any) -> bool:
        if decayed == "all":
            return True
        if decayed == "all_but_norms":
            return not (path[-1] == "bias" or "norm" in path[-2])
        matrix = path[-1] == "kernel" and (path[-2] in MATRICES or "feature_map" in path[-2])
        return matrix or "feature_map" in path[-1] or path[-1] == "embedding"

    return rule


class Guarded(NamedTuple):
    """State of `skip_bad_steps`.

    inner: the optimizer's own.
    norms: gradient norms of the last steps that were taken, NaN where there were none yet.
    skipped, in_a_row: steps skipped so far, and since the last that was taken.
    """

    inner: Any
    norms: jax.Array
    skipped: jax.Array
    in_a_row: jax.Array


def skip_bad_steps(
    inner: optax.GradientTransformation, spike_factor: float, window: int = 64, least: int = 16
) -> optax.GradientTransformationExtraArgs:
    """Leave parameters and the state of `inner`, its schedule's count included, as they were where a step is bad.

    It is where `loss` or the gradient's norm is not finite; with a `spike_factor` also where the norm is more than that
    times the median of the last `window` steps taken, once there are `least` of them.
    """

    def init(params):
        counters = (jnp.zeros((), jnp.int32) for _ in range(2))  # two arrays: a step donates each
        return Guarded(inner.init(params), jnp.full(window, jnp.nan, jnp.float32), *counters)

    def update(updates, state, params=None, **extra):
        loss = extra["loss"]
        norm = optax.tree.norm(updates).astype(jnp.float32)
        bad = ~(jnp.isfinite(norm) & jnp.isfinite(loss))
        if spike_factor:
            known = jnp.sum(jnp.isfinite(state.norms)) >= least
            bad |= known & (norm > spike_factor * jnp.nanmedian(state.norms))
        found, after = inner.update(updates, state.inner, params)
        norms = jnp.roll(state.norms, 1).at[0].set(norm)

        def unless_bad(new, old):
            return jax.tree.map(lambda a, b: jnp.where(bad, b, a), new, old)

        taken = Guarded(after, norms, state.skipped, jnp.zeros_like(state.in_a_row))
        left = state._replace(skipped=state.skipped + 1, in_a_row=state.in_a_row + 1)
        return unless_bad(found, jax.tree.map(jnp.zeros_like, found)), unless_bad(taken, left)

    return optax.GradientTransformationExtraArgs(init, update)


def clip_by_layer(limit: float) -> optax.GradientTransformation:
    """Scale each layer's gradient to a norm of at most `limit`, all leaves of the layer together.

    Layers are slices of the stacked axis of `updates["layers"][block]`; what is outside them is one more group. One
    norm over all layers would let the late layers, whose outputs are large, throttle the early ones.
    """

    def factor(squares):
        return jnp.minimum(1.0, limit / (jnp.sqrt(squares) + 1e-6))

    def update(updates, state, params=None):
        del params
        clipped = {}
        for block, tree in updates["layers"].items():
            squares = sum(jnp.sum(g.astype(jnp.float32) ** 2, axis=range(1, g.ndim)) for g in jax.tree.leaves(tree))
            clipped[block] = jax.tree.map(lambda g, s=squares: _scale_rows(g, factor(s)), tree)
        rest = {name: tree for name, tree in updates.items() if name != "layers"}
        scale = factor(optax.tree.norm(rest) ** 2) if rest else 1.0
        return {"layers": clipped, **jax.tree.map(lambda g: (g * scale).astype(g.dtype), rest)}, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def only_layers(aligned: jax.Array) -> optax.GradientTransformation:
    """Leave layers that are not aligned where they are: decay would move them though their gradient is 0."""

    def update(updates, state, params=None):
        del params
        blocks = {}
        for block, tree in updates["layers"].items():
            rows = aligned[:, int(block.removeprefix("block_"))]
            blocks[block] = jax.tree.map(lambda g, rows=rows: _scale_rows(g, rows), tree)
        return {**updates, "layers": blocks}, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _scale_rows(g: jax.Array, rows: jax.Array) -> jax.Array:
    return (g * rows.reshape(-1, *(1,) * (g.ndim - 1))).astype(g.dtype)


def _scale_by_path(rate: Callable[[Path], float]) -> optax.GradientTransformation:
    def update(updates, state, params=None):
        del params
        return path_aware_map(lambda path, g: rate(path) * g, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
