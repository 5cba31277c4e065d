"""What a linear map can read from a state: ridge regression onto the classes, tested on examples it has not seen."""

from __future__ import annotations

import functools
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

FEATURES = 4096  # numbers that a layer's states are projected to
BATCH = 8  # sequences read together
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # in units of the mean eigenvalue of the training examples' products


def measure(
    config: ModelConfig, params: Any, found: Examples, distances: Sequence[int], seed: int,
    done: Callable[[int], Any] = lambda n: None,
) -> dict[str, Any]:  # fmt: skip
    """How well the needle's digit is read from the states at each of `distances` tokens after it.

    Returns layers, for each linear-time layer {accuracy, interval} by distance, and together, the same for one probe on
    all of them, each scaled to the same variance.
    """
    right = []  # [distances][layers, then together]
    for parts in _read_states(config, params, found, distances, seed, done):
        x = [np.concatenate(batches) for batches in parts]
        x.append(np.concatenate([layer / (np.linalg.norm(layer - layer.mean(0)) + 1e-30) for layer in x], axis=1))
        right.append([int(np.sum(predict(each, found.labels, found.folds) == found.labels)) for each in x])
    total = len(found.labels)
    *layers, together = (
        {"accuracy": [n / total for n in counts], "interval": [wilson(n, total) for n in counts]}
        for counts in zip(*right, strict=True)
    )
    return {"layers": layers, "together": together}


def _read_states(
    config: ModelConfig, params: Any, found: Examples, distances: Sequence[int], seed: int, done: Callable[[int], Any]
) -> list[list[list[np.ndarray]]]:
    """States after the needle, projected: [distances][linear-time layers][batches] of [B, features]."""
    numbers = linear_layers(config)
    read: list[list[list[np.ndarray]]] = [[[] for _ in numbers] for _ in distances]
    for start in range(0, len(found.tokens), BATCH):
        part = found.tokens[start : start + BATCH]
        padded = np.pad(part, ((0, BATCH - len(part)), (0, 0)), mode="edge")  # one program for all
        stops = [found.end + distance for distance in distances]
        for here, memories in zip(read, walk(config, params, padded, stops), strict=True):
            blocks = {block: np.asarray(features(matrix(memory), seed)) for block, memory in memories.items()}
            for batches, number in zip(here, numbers, strict=True):
                row, block = divmod(number, config.period)
                batches.append(blocks[f"block_{block}"][row, : len(part)])
        done(len(part))
    return read


@functools.partial(jax.jit, static_argnums=1)
def features(states: Float[Array, "R B H K V"], seed: int) -> Float[Array, "R B F"]:
    """States as probes see them: all heads together, projected."""
    return sketch(states.reshape(*states.shape[:2], -1), FEATURES, seed)


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
    from scipy.stats import binomtest  # takes a moment to import

    low, high = binomtest(right, total).proportion_ci(0.95, method="wilson")
    return float(low), float(high)
