"""Small models that several tests share."""

from __future__ import annotations

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxlin.config import MeshConfig, MixerOptions, ModelConfig
from jaxlin.mixers import MIXERS, resolve_options
from jaxlin.model import LanguageModel
from jaxlin.sharding import make_mesh

STUDENT_MIXERS = [name for name in MIXERS if name != "softmax"]
TEACHER = ModelConfig(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)


def student_of(mixer: str, preset: str = "recommended", teacher: ModelConfig = TEACHER, **options) -> ModelConfig:
    """A student of `teacher`; `mixer` may be a period joined by +."""
    names = tuple(mixer.split("+"))
    resolved = tuple(resolve_options(name, preset, MixerOptions(**options)) for name in names)
    return replace(teacher, mixer=names, options=resolved)


def mesh_of(config: MeshConfig) -> jax.sharding.Mesh:
    """A mesh of the first devices, as many as it has places."""
    count = abs(config.data) * config.fsdp * config.tensor * config.sequence
    return make_mesh(config, jax.devices()[:count])


@functools.cache
def random_params(config: ModelConfig, seed: int = 0):
    """Random parameters, also where initialisation would give zeros or an identity."""

    @jax.jit
    def draw():
        params = nn.unbox(LanguageModel(config).init(jax.random.key(seed), jnp.zeros((1, 1), jnp.int32)))["params"]
        leaves, tree = jax.tree.flatten(params)
        keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
        noise = [0.1 * jax.random.normal(key, a.shape, a.dtype) for key, a in zip(keys, leaves, strict=True)]
        return jax.tree.unflatten(tree, [a + n for a, n in zip(leaves, noise, strict=True)])

    with jax.ensure_compile_time_eval():  # whoever asks first may be tracing
        return draw()


@functools.partial(jax.jit, static_argnums=0)
def logits(config: ModelConfig, params, tokens, segment_ids=None):
    """Logits of a forward pass."""
    return LanguageModel(config).apply({"params": params}, tokens, segment_ids=segment_ids).logits
