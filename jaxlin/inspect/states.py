"""The states of a student's layers while it reads: their rank and size.

Of a state S with singular values s_1 >= s_2 >= ...:

effective rank: exp(-sum p_i log p_i) with p_i = s_i / sum s (Roy & Vetterli 2007, "The effective rank: a measure of
effective dimensionality", EUSIPCO): how many directions are in use, were all of them equally strong;
stable rank: sum s_i^2 / s_1^2 (Rudelson & Vershynin 2007, arXiv math/0503442): the same by energy, which a few strong
directions dominate;
norm: the Frobenius norm, sqrt(sum s_i^2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jaxlin.config import ModelConfig
from jaxlin.inspect.gates import linear_layers
from jaxlin.model import init_state
from jaxlin.session import PREFILL_CHUNK, prefill


def walk(config: ModelConfig, params: Any, tokens: np.ndarray, stops: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Read tokens [B, T] from stop to stop; at each, {block: memory} as the mixers keep it, stacked over layers.

    The next step overwrites what it gave: compute from it before. `stops` ascend, from 1 or more up to T.
    """
    state = init_state(config, len(tokens), stops[-1])
    for start, stop in zip((0, *stops), stops, strict=False):
        _, state = prefill(config, params, state, tokens[:, start:stop], None, PREFILL_CHUNK, start == 0)
        yield {
            f"block_{i}": state["layers"][f"block_{i}"]["memory"]
            for i, mixer in enumerate(config.mixer)
            if mixer != "softmax"
        }


def matrix(memory: Any) -> Any:
    """S itself, [R, B, H, K, V]: what a mixer keeps beside it are normalisers."""
    return memory[0] if isinstance(memory, tuple) else memory


def measure(
    config: ModelConfig, params: Any, sequences: np.ndarray, positions: Sequence[int],
    done: Callable[[int], Any] = lambda n: None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Of each linear-time layer: shape [K, V] of a head's state; effective_rank, stable_rank and norm,
    [positions][heads], means over sequences [N, T].
    """
    seen = []
    for tokens in sequences:
        seen.append(
            [{b: spectrum(m) for b, m in here.items()} for here in walk(config, params, tokens[None], positions)]
        )
        done(1)
    means = jax.tree.map(lambda *a: np.mean(a, axis=0)[:, 0], *seen)
    curves = jax.tree.map(lambda *a: np.stack(a), *means)  # {block: {name: [positions, R, H]}}
    empty, layers = init_state(config, 1, 1)["layers"], []
    for number in linear_layers(config):
        row, block = number // config.period, f"block_{number % config.period}"
        shape = matrix(empty[block]["memory"]).shape[-2:]
        layers.append({"shape": shape, **{name: a[:, row].tolist() for name, a in curves[block].items()}})
    return layers


def spectrum(memory: Any) -> dict[str, np.ndarray]:
    """effective_rank, stable_rank and norm [R, B, H] of states as a mixer keeps them."""
    values = np.linalg.svd(np.asarray(matrix(memory), np.float64), compute_uv=False)
    norm = np.sqrt(np.sum(values**2, axis=-1))
    if isinstance(memory, tuple) and len(memory) == 3:  # the mLSTM keeps e^-m C
        norm = norm * np.exp(np.asarray(memory[2], np.float64))
    return {"effective_rank": effective_rank(values), "stable_rank": stable_rank(values), "norm": norm}


def effective_rank(values: np.ndarray) -> np.ndarray:
    """From singular values [..., n]; 0 where all of them are."""
    total = values.sum(-1, keepdims=True)
    p = values / np.where(total > 0, total, 1)
    return np.where(total[..., 0] > 0, np.exp(-np.sum(p * np.log(np.where(p > 0, p, 1)), axis=-1)), 0.0)


def stable_rank(values: np.ndarray) -> np.ndarray:
    """From singular values [..., n]; 0 where all of them are."""
    largest = np.max(values, axis=-1)
    return np.sum(values**2, axis=-1) / np.where(largest > 0, largest, 1) ** 2
