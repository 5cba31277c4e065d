"""Small models that several tests share."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxlin.config import MixerOptions, ModelConfig
from jaxlin.mixers import MIXERS, resolve_options
from jaxlin.model import LanguageModel

STUDENT_MIXERS = [name for name in MIXERS if name != "softmax"]
TEACHER = ModelConfig(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)


def student_of(mixer: str, preset: str = "recommended", teacher: ModelConfig = TEACHER, **options) -> ModelConfig:
    """A student of `teacher`; `mixer` may be a period joined by +."""
    names = tuple(mixer.split("+"))
    resolved = tuple(resolve_options(name, preset, MixerOptions(**options)) for name in names)
    return replace(teacher, mixer=names, options=resolved)


def random_params(config: ModelConfig, seed: int = 0):
    """Random parameters, also where initialisation would give zeros or an identity."""
    params = nn.unbox(LanguageModel(config).init(jax.random.key(seed), jnp.zeros((1, 1), jnp.int32)))["params"]
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    noisy = [
        leaf + 0.1 * jax.random.normal(key, leaf.shape, leaf.dtype) for leaf, key in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(tree, noisy)
