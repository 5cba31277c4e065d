"""What a decoding step does to memory: every layer's state is read and written once, where it is."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlin import ops
from jaxlin.decoding import BLOCK, Carry, decode
from jaxlin.mixers.attention import attend_to_cache
from jaxlin.model import init_params, init_state
from jaxlin.sampling import GREEDY, row_keys
from tests import hopper
from tests.models import STUDENT_MIXERS, TEACHER, student_of
from tests.quick_xla import USUAL

BATCH, ROOM, LAYERS = 3, 512, 4


def traced(mixer):
    """The program of a block of tokens, before it is compiled, and the shapes of the states of all layers."""
    config = student_of(mixer, teacher=replace(TEACHER, dtype="bfloat16", num_hidden_layers=LAYERS))
    params = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    state = jax.eval_shape(lambda: init_state(config, BATCH, ROOM))
    row = jax.ShapeDtypeStruct((BATCH,), jnp.int32)
    keys = jax.eval_shape(lambda: row_keys(0, range(BATCH)))
    carry = Carry(row, jax.ShapeDtypeStruct((BATCH,), jnp.uint32), keys, None, state)
    return decode.trace(config, GREEDY, BLOCK, params, carry), [a.shape for a in jax.tree.leaves(state["layers"])]


@pytest.mark.parametrize("mixer", STUDENT_MIXERS)
def test_a_student_on_a_gpu(mixer, monkeypatch):
    """One kernel a layer overwrites its part of all layers' states, of which nothing else makes or takes a copy."""
    hopper.pretend(monkeypatch)
    program, shapes = traced(mixer)
    text = program.lower(lowering_platforms=("cuda",)).as_text()
    memory = next(shape for shape in shapes if len(shape) == 5 and shape[-1] == shape[-2] == TEACHER.head_dim)
    stack, layer = (f"tensor<{'x'.join(map(str, shape))}xf32>" for shape in (memory, memory[1:]))
    (kernel,) = (line for line in text.splitlines() if "custom_call @mosaic_gpu" in line)
    assert stack in kernel and "output_operand_alias" in kernel
    assert layer not in text and layer.replace("<", "<1x") not in text
    for line in text.splitlines():
        made = line.rpartition("->")[2] if "->" in line else line.rpartition(":")[2]
        if stack in made and line is not kernel:  # passed on by loops and functions, or handed over to the kernel
            assert re.search(r"stablehlo.(while|return)|call @|func|return|optimization_barrier|\^", line), line


def test_a_cache(monkeypatch):
    """Nothing writes down the caches of all layers but what puts one entry into them, nor any cache in float32."""
    monkeypatch.setattr(ops, "platform", lambda: "tpu")  # how accelerators attend; compiled for the CPU
    program, shapes = traced("softmax")
    cache = max(shapes, key=math.prod)
    stack, *layer = (",".join(map(str, shape)) for shape in (cache, cache[1:], (1, *cache[1:])))
    made, fused = [], False
    for line in program.lower().compile(USUAL).as_text().splitlines():
        if line.endswith("{"):  # a computation: what is inside a fusion is not written down
            fused = "fused" in line.split()[0] or "scatter" in line.split()[0]
        found = re.match(r"\s*(?:ROOT )?%?(\S+) = (\w+)\[([\d,]+)\]\S* ([\w-]+)\(", line)
        if found and not fused and found[4] not in ("parameter", "get-tuple-element"):
            assert not (found[2] == "f32" and found[3] in layer), line
            if found[3] == stack:
                made.append(found[1])
    assert len(made) == 2 and all("scatter" in name for name in made)


def test_attention_to_a_cache(monkeypatch):
    """As accelerators do it, and as CPUs do."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(3, n, h, 8)), jnp.float32) for n, h in ((1, 4), (20, 2), (20, 2)))
    length = jnp.array([20, 1, 7])
    expected = attend_to_cache(q, k, v, length, "float32")
    monkeypatch.setattr(ops, "platform", lambda: "tpu")
    np.testing.assert_allclose(attend_to_cache(q, k, v, length, "float32"), expected, rtol=1e-5, atol=1e-6)
