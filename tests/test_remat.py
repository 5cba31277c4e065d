"""Rematerialisation: every policy trains the same model; they differ in what is computed twice."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxlin.kernels.hlo_tpu_traffic import program_flops
from jaxlin.model import KEPT, forward
from tests.models import random_params, student_of

POLICIES = ("none", *KEPT)


def gradient(config, remat):
    def loss(params, tokens, segment_ids):
        return jnp.mean(forward(config, params, tokens, segment_ids=segment_ids, remat=remat).logits ** 2)

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
