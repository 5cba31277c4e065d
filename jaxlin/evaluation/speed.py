"""Tokens per second: reading and writing."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxlin.distill import Batch
from jaxlin.evaluation.language_modeling import on_mesh, perplexity
from jaxlin.generate import generate
from jaxlin.runs import Teacher

PROMPT, NEW = 16, 33  # tokens; all but the first new one come from decoding steps


def speed(model: Teacher, batch: Batch, mesh: jax.sharding.Mesh | None = None) -> dict[str, float]:
    """Tokens per second of the forward pass (loss included) over `batch`, and of greedy decoding of its rows."""
    prompts = np.asarray(batch["tokens"])[:, :PROMPT].tolist()
    forward = _seconds(lambda: perplexity(model.config, model.params, [batch], mesh=mesh))
    with on_mesh(mesh):
        decode = _seconds(lambda: generate(model.config, model.params, prompts, max_new_tokens=NEW))
    return {
        "forward_tokens_per_second": np.asarray(batch["tokens"]).size / forward,
        "decode_tokens_per_second": len(prompts) * NEW / decode,
    }


def _seconds(function: Callable[[], Any]) -> float:
    """Time of the second call: the first one compiles."""
    function()
    began = time.perf_counter()
    function()
    return time.perf_counter() - began
