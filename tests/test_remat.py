"""Every policy of rematerialisation, and layers in a loop or not, train the same model."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxlin.kernels.hlo_tpu_traffic import program_flops
from jaxlin.model import KEPT, forward
from tests.models import random_params, student_of

POLICIES = ("none", *KEPT)


def gradient(config, remat, unroll=False):
    def loss(params, tokens, segment_ids):
        found = forward(config, params, tokens, segment_ids=segment_ids, remat=remat, packed=True, unroll=unroll)
        return jnp.mean(found.logits**2)

    return jax.jit(jax.value_and_grad(loss))


def test_policies():
    """Same losses and gradients; fewer products the more is kept, and none twice where all that they put out is."""
    config = student_of("retnet")
    tokens = jax.random.randint(jax.random.key(0), (1, 80), 0, config.vocab_size)
    args = random_params(config), tokens, jnp.sort(jax.random.randint(jax.random.key(1), (1, 80), 1, 3))
    expected = gradient(config, "none")(*args)
    for remat in KEPT:
        found = gradient(config, remat)(*args)
        jax.tree.map(lambda f, e: np.testing.assert_allclose(f, e, rtol=1e-4, atol=1e-6), found, expected)

    flops = {remat: program_flops(gradient(config, remat).trace(*args).jaxpr) for remat in POLICIES}
    assert flops["none"] == flops["dots"] < flops["states"] < flops["block"]


def test_unrolled():
    """No loop of the length of the layers is left, nor an array of what the backward pass needs of all of them."""
    config = student_of("retnet", conv_size=0)
    tokens = jax.random.randint(jax.random.key(0), (1, 64), 0, config.vocab_size)
    args = random_params(config), tokens, jnp.ones_like(tokens)
    compiled = {unroll: gradient(config, "dots", unroll).lower(*args).compile() for unroll in (False, True)}
    jax.tree.map(
        lambda f, e: np.testing.assert_allclose(f, e, rtol=1e-4, atol=1e-6), *(c(*args) for c in compiled.values())
    )
    stacked = {unroll: program.as_text().count("f32[2,1,64,96]") for unroll, program in compiled.items()}
    assert stacked[False] > 0 == stacked[True]
