"""How well a student predicts held-out text, beside its teacher, and how far it is from it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from jaxlin.config import ModelConfig
from jaxlin.distill import Batch, counts, targets_of
from jaxlin.losses import logit_sums
from jaxlin.model import forward, head_kernel
from jaxlin.sharding import batch_sharding, batch_shards, on_every_device


def compare(
    teacher: ModelConfig,
    teacher_params: Any,
    student: ModelConfig,
    student_params: Any,
    batches: Iterable[Batch],
    *,
    mesh: jax.sharding.Mesh | None = None,
) -> dict[str, float]:
    """Student against teacher on `batches` of tokens and segment_ids [B, T], the same on every process.

    Where batches also hold `learned` [B, T], true for the tokens to be predicted, everything is measured there alone.

    Returns perplexity and teacher_perplexity (per token, over tokens with a successor in their segment), kl
    (KL(teacher || student) in nats per token), agreement (how often both put the same token first), and the counts
    that these are over: tokens, and next_tokens for the perplexities.
    """
    return summary(batch_sums(teacher, teacher_params, student, student_params, batches, mesh=mesh))


def batch_sums(
    teacher: ModelConfig,
    teacher_params: Any,
    student: ModelConfig,
    student_params: Any,
    batches: Iterable[Batch],
    *,
    mesh: jax.sharding.Mesh | None = None,
) -> list[dict[str, float]]:
    """What `compare` is made of, for each batch: sums over its tokens (ce, teacher_ce, kl, agree) and their counts."""
    with on_mesh(mesh):
        found = (_sums(teacher, student, teacher_params, student_params, put(batch, mesh)) for batch in batches)
        return [{k: float(v) for k, v in sums.items()} for sums in found]


def summary(sums: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """What `compare` returns, from the sums of batches."""
    totals = _total(sums)
    return {
        "perplexity": math.exp(totals["ce"] / totals["next_tokens"]),
        "teacher_perplexity": math.exp(totals["teacher_ce"] / totals["next_tokens"]),
        "kl": totals["kl"] / totals["tokens"],
        "agreement": totals["agree"] / totals["tokens"],
        "tokens": int(totals["tokens"]),
        "next_tokens": int(totals["next_tokens"]),
    }


def perplexity(
    config: ModelConfig, params: Any, batches: Iterable[Batch], *, mesh: jax.sharding.Mesh | None = None
) -> dict[str, float]:
    """One model's perplexity on `batches`, and the tokens that it is over."""
    with on_mesh(mesh):
        totals = _total(_own_sums(config, params, put(batch, mesh)) for batch in batches)
    return {
        "perplexity": math.exp(totals["ce"] / totals["next_tokens"]),
        "tokens": int(totals["tokens"]),
        "next_tokens": int(totals["next_tokens"]),
    }


def on_mesh(mesh: jax.sharding.Mesh | None) -> Any:
    """A context in which `mesh`, where there is one, is the current mesh."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def put(batch: Batch, mesh: jax.sharding.Mesh | None) -> Batch:
    """The batch on its devices. With several processes, each holds the whole batch and sends its devices' part."""
    host = {name: np.asarray(a) for name, a in batch.items()}
    if mesh is None:
        return host
    # Padding rows, which count nowhere: what a batch holds does not depend on the mesh.
    host = {name: np.pad(a, ((0, -len(a) % batch_shards(mesh)), (0, 0))) for name, a in host.items()}
    place = batch_sharding(mesh)
    return {name: jax.make_array_from_callback(a.shape, place, a.__getitem__) for name, a in host.items()}


def _total(sums: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The sums of all batches; refused where they hold nothing to predict."""
    totals: dict[str, float] = {}
    for of_batch in sums:
        totals = {k: totals.get(k, 0.0) + float(v) for k, v in of_batch.items()}
    if not totals.get("next_tokens"):
        raise ValueError("batches: no token is followed by another of its segment, so there is nothing to predict")
    return totals


@jax.jit(static_argnums=(0, 1))
def _sums(teacher: ModelConfig, student: ModelConfig, teacher_params, student_params, batch):
    tokens, segment_ids = batch["tokens"], batch["segment_ids"]
    target = forward(teacher, teacher_params, tokens, segment_ids=segment_ids, logits=False).hidden
    hidden = forward(student, student_params, tokens, segment_ids=segment_ids, logits=False).hidden
    kernels = head_kernel(student_params), head_kernel(teacher_params)
    sums = logit_sums(hidden, target, *kernels, targets_of(batch), student)
    return on_every_device({**sums._asdict(), **counts(batch)})


@jax.jit(static_argnums=0)
def _own_sums(config: ModelConfig, params, batch):
    tokens, segment_ids = batch["tokens"], batch["segment_ids"]
    hidden = forward(config, params, tokens, segment_ids=segment_ids, logits=False).hidden
    kernel = head_kernel(params)
    sums = logit_sums(hidden, hidden, kernel, kernel, targets_of(batch), config)
    return on_every_device({"ce": sums.ce, **counts(batch)})
