"""The three stages: what trains, on what input, with which loss (paper, section 3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax

from jaxlin.config import ModelConfig, Stage1Config, Stage2Config, Stage3Config, StageConfig
from jaxlin.losses import attention_output_loss, distillation_loss, hidden_state_loss, logit_sums, targets
from jaxlin.mixers.common import RMSNorm, positions_in_segments
from jaxlin.model import LanguageModel, blocks, head_kernel

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
# (trained parameters, all student parameters, teacher parameters, batch, step-wide counts) -> (gradients, metrics)
GradientFunction = Callable[[Any, Any, Any, Batch, Any], tuple[Any, Metrics]]


def trained_part(params: Any, stage: StageConfig) -> Any:
    """The parameters a stage trains: the mixers; the blocks (without their MLP unless train_mlp); everything."""
    if isinstance(stage, Stage3Config):
        return params
    mlp = isinstance(stage, Stage2Config) and stage.train_mlp
    keep = {"mixer"} if isinstance(stage, Stage1Config) else {"mixer", "input_layernorm", "post_attention_layernorm"}
    keep |= {"mlp"} if mlp else set()
    return {
        "layers": {
            block: {name: part for name, part in parts.items() if name in keep}
            for block, parts in params["layers"].items()
        }
    }


def merge(params: Any, part: Any) -> Any:
    """`params` with the leaves of `part` put in."""
    return unflatten_dict({**flatten_dict(params), **flatten_dict(part)})


def counts(batch: Batch) -> dict[str, jax.Array]:
    """What the losses of a step are divided by: valid tokens, tokens with a successor, sequences."""
    at = targets(batch["tokens"], batch["segment_ids"])
    return {
        "tokens": jnp.sum(at.valid, dtype=jnp.float32),
        "next_tokens": jnp.sum(at.has_next, dtype=jnp.float32),
        "sequences": jnp.float32(batch["tokens"].shape[0]),
    }


def layer_weights(stage: StageConfig, layers: int) -> jax.Array:
    """Weight of each layer's loss, [L]: 0 outside the aligned layers; 1, or 1 / |aligned| for a mean."""
    aligned = jnp.zeros(layers).at[jnp.array(stage.layers, int)].set(1) if stage.layers else jnp.ones(layers)
    return aligned / jnp.sum(aligned) if stage.layer_reduction == "mean" else aligned


def gradient_function(stage: StageConfig, student: ModelConfig, teacher: ModelConfig, remat: str) -> GradientFunction:
    """The stage's gradients and metrics, for one micro-batch."""
    if isinstance(stage, Stage3Config):
        return _end_to_end(stage, student, teacher, remat)
    return _layer_local(stage, student, teacher)


def _layer_local(stage: StageConfig, student: ModelConfig, teacher: ModelConfig) -> GradientFunction:
    """Stages 1 and 2: every student layer sees the teacher's residual stream, so gradients stay inside the layer.

    One scan over layers carries that stream alone; no activation outlives its layer, whatever the depth.
    """
    (teacher_block,) = blocks(teacher)
    student_blocks = blocks(student)
    layers, period = student.num_hidden_layers, student.period

    def gradients(trained, params, teacher_params, batch, count):
        tokens, segment_ids = batch["tokens"], batch["segment_ids"]
        positions, _ = positions_in_segments(tokens.shape, segment_ids, None)
        call = dict(positions=positions, segment_ids=segment_ids)
        valid = segment_ids != 0
        final_norm = {"params": teacher_params["norm"]}

        def layer(hidden, xs):
            weight, last, part, rest, teacher_part, block = xs
            output, mixed, _ = teacher_block.apply({"params": teacher_part}, hidden, **call)

            def loss(part):
                student_output, student_mixed, _ = block.apply({"params": {**rest, **part}}, hidden, **call)
                if isinstance(stage, Stage1Config):
                    value = attention_output_loss(student_mixed, mixed, valid, count["tokens"], stage)
                    return weight * value, (value, *squares(student_mixed, mixed, valid))
                target = output
                if stage.post_norm_target:
                    target = jnp.where(last, RMSNorm(teacher).apply(final_norm, output), output)
                value = hidden_state_loss(student_output, target, valid, count["tokens"], stage)
                return weight * value, (value, *squares(student_output, target, valid))

            gradient, seen = jax.grad(loss, has_aux=True)(part)
            return output, (gradient, seen)

        def period_of_layers(hidden, xs):
            weights, lasts, parts, rests, teacher_parts = xs
            found, seen = {}, []
            for i, block in enumerate(student_blocks):
                teacher_part = jax.tree.map(lambda a, i=i: a[i], teacher_parts)
                rest = rests[block.name]
                hidden, (found[block.name], s) = layer(
                    hidden, (weights[i], lasts[i], parts[block.name], rest, teacher_part, block)
                )
                seen.append(s)
            return hidden, (found, jax.tree.map(lambda *a: jnp.stack(a), *seen))

        def by_period(a):
            return a.reshape(layers // period, period, *a.shape[1:])

        weights = layer_weights(stage, layers)
        embedded = jnp.take(teacher_params["embed_tokens"]["embedding"], tokens, axis=0).astype(teacher.dtype)
        xs = (
            by_period(weights),
            by_period(jnp.arange(layers) == layers - 1),
            trained["layers"],
            params["layers"],
            jax.tree.map(by_period, teacher_params["layers"]["block_0"]),
        )
        _, (found, seen) = lax.scan(period_of_layers, embedded, xs)
        losses, error, power = (a.reshape(layers) for a in seen)
        metrics = {"loss": jnp.sum(weights * losses), "layer_loss": losses, "error": error, "power": power}
        return {"layers": found}, metrics

    return gradients


def squares(student, teacher, valid) -> tuple[jax.Array, jax.Array]:
    """Sums over tokens and width of the squared error and of the teacher's square: their quotient is the NMSE."""
    student, teacher = (jnp.where(valid[..., None], a.astype(jnp.float32), 0) for a in (student, teacher))
    return jnp.sum((student - teacher) ** 2), jnp.sum(teacher**2)


def _end_to_end(stage: Stage3Config, student: ModelConfig, teacher: ModelConfig, remat: str) -> GradientFunction:
    """Stage 3: KL to the teacher's next-token distribution, and cross-entropy, through the whole student."""

    def gradients(trained, params, teacher_params, batch, count):
        tokens, segment_ids = batch["tokens"], batch["segment_ids"]
        at = targets(tokens, segment_ids)
        call = dict(segment_ids=segment_ids, logits=False)
        target = LanguageModel(teacher).apply({"params": teacher_params}, tokens, **call).hidden

        def loss(trained):
            hidden = LanguageModel(student, remat).apply({"params": trained}, tokens, **call).hidden
            sums = logit_sums(
                hidden,
                target,
                head_kernel(trained),
                head_kernel(teacher_params),
                at,
                student,
                temperature=stage.temperature,
                chunk_tokens=stage.chunk_tokens,
            )
            value = distillation_loss(sums, count["tokens"], count["next_tokens"], count["sequences"], stage)
            return value, sums

        (value, sums), gradient = jax.value_and_grad(loss, has_aux=True)(trained)
        metrics = {
            "loss": value,
            "kl": sums.kl / count["tokens"],
            "ce": sums.ce / jnp.maximum(count["next_tokens"], 1),
            "agreement": sums.agree / count["tokens"],
        }
        return gradient, metrics

    return gradients
