"""What a linear map can read from a state: ridge regression onto the classes, tested on examples it has not seen."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxlin.config import ModelConfig
from jaxlin.inspect.gates import linear_layers
from jaxlin.inspect.needle import DIGITS, Examples
from jaxlin.inspect.states import matrix, walk

FEATURES = 1024  # numbers that a layer's states are projected to
BATCH = 8  # sequences read together
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # in units of the mean eigenvalue of the training examples' products
Z95 = 1.959964  # standard normal quantile of a two-sided 95 % interval


def measure(
    config: ModelConfig, params: Any, found: Examples, distances: Sequence[int], seed: int,
    done: Callable[[int], Any] = lambda n: None,
) -> dict[str, Any]:  # fmt: skip
    """How well the needle's digit is read from the states at each of `distances` tokens after it.

    Returns layers, for each linear-time layer {accuracy, interval} by distance, and together, the same for one probe on
    all of them.
    """
    read = _read_states(config, params, found, distances, seed, done)  # [distances][layers] of [N, features]

    def scores(features: Sequence[np.ndarray]) -> dict[str, Any]:
        right = [int(np.sum(predict(x, found.labels, found.folds) == found.labels)) for x in features]
        counts = [(n, len(found.labels)) for n in right]
        return {"accuracy": [n / total for n, total in counts], "interval": [wilson(*each) for each in counts]}

    layers = [scores([here[i] for here in read]) for i in range(len(read[0]))]
    return {"layers": layers, "together": scores([np.concatenate(here, axis=1) for here in read])}


def _read_states(
    config: ModelConfig, params: Any, found: Examples, distances: Sequence[int], seed: int, done: Callable[[int], Any]
) -> list[list[np.ndarray]]:
    """States after the needle, projected: [distances][layers] of [N, features]."""
    stops = [found.end + distance for distance in distances]
    rows: list[list[list[np.ndarray]]] = []
    for start in range(0, len(found.tokens), BATCH):
        part = found.tokens[start : start + BATCH]
        padded = np.pad(part, ((0, BATCH - len(part)), (0, 0)), mode="edge")  # one program for all
        here = []
        for memories in walk(config, params, padded, stops):
            blocks = {block: np.asarray(features(matrix(memory), seed)) for block, memory in memories.items()}
            places = (divmod(i, config.period) for i in linear_layers(config))
            here.append([blocks[f"block_{block}"][row, : len(part)] for row, block in places])
        rows.append(here)
        done(len(part))
    return [[np.concatenate(parts) for parts in zip(*at, strict=True)] for at in zip(*rows, strict=True)]


@functools.partial(jax.jit, static_argnums=1)
def features(states: Float[Array, "R B H K V"], seed: int) -> Float[Array, "R B F"]:
    """States as probes see them: each head's of unit norm, as output norms make it, and all projected together."""
    norms = jnp.sqrt(jnp.sum(states * states, axis=(-2, -1), keepdims=True))
    unit = states / jnp.maximum(norms, 1e-30)
    return sketch(unit.reshape(*unit.shape[:2], -1), FEATURES, seed)


def sketch(x: Float[Array, "*n D"], size: int, seed: int) -> Float[Array, "*n F"]:
    """A random projection of x to `size` numbers that keeps inner products on average; x itself where it is smaller.

    Entries get random signs and are added up in groups of equal size, drawn at random: the count sketch (Charikar, Chen
    & Farach-Colton 2002), which needs no matrix.
    """
    dim = x.shape[-1]
    if dim <= size:
        return x
    rng = np.random.default_rng(seed)
    order, signs = rng.permutation(dim), rng.choice([-1.0, 1.0], size=dim)
    mixed = x[..., order] * jnp.asarray(signs, x.dtype)
    padded = jnp.pad(mixed, [(0, 0)] * (x.ndim - 1) + [(0, -dim % size)])
    return jnp.sum(padded.reshape(*x.shape[:-1], -1, size), axis=-2)


def predict(x: np.ndarray, labels: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """The label of each of x [N, F], as read by a probe that was fitted on the other folds' examples."""
    found = np.zeros_like(labels)
    for fold in np.unique(folds):
        test = folds == fold
        found[test] = ridge(x[~test], labels[~test], x[test], len(DIGITS))
    return found


def ridge(train: np.ndarray, labels: np.ndarray, test: np.ndarray, classes: int) -> np.ndarray:
    """Labels of `test` [M, F] by ridge regression onto indicators of the classes, in closed form from inner products.

    The penalty is the one of RIDGES with the least squared leave-one-out error (Golub, Heath & Wahba 1979): for
    coefficients c = (G + p)^-1 y that of example i is c_i / ((G + p)^-1)_ii.
    """
    mean = train.mean(0, dtype=np.float64)
    train, test = train - mean, test - mean
    targets = np.eye(classes)[labels]
    average = targets.mean(0)
    values, vectors = np.linalg.eigh(train @ train.T)
    values = np.maximum(values, 0)
    projected = vectors.T @ (targets - average)

    def fit(penalty: float) -> tuple[float, np.ndarray]:
        shrunk = 1 / (values + penalty)
        coefficients = vectors @ (shrunk[:, None] * projected)
        errors = coefficients / (vectors**2 @ shrunk)[:, None]
        return float(np.mean(errors**2)), coefficients

    scale = max(float(values.mean()), 1e-12)  # all the same: nothing to be read
    _, best = min((fit(scale * size) for size in RIDGES), key=lambda each: each[0])
    return np.argmax(test @ (train.T @ best) + average, axis=1)


def wilson(right: int, total: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927), which holds for few examples and near 0 and 1."""
    share, unit = right / total, Z95**2 / total
    middle = (share + unit / 2) / (1 + unit)
    half = Z95 / (1 + unit) * math.sqrt(share * (1 - share) / total + unit / (4 * total))
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))  # whatever is rounded
