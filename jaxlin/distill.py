"""The three stages: what trains, on what input, with which loss (paper, section 3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxlin.config import ModelConfig, Stage1Config, Stage2Config, Stage3Config, StageConfig
from jaxlin.layer_local import Batch, by_block, by_layer, walk
from jaxlin.losses import attention_output_loss, distillation_loss, hidden_state_loss, loss_weights, targets
from jaxlin.mixers.common import RMSNorm
from jaxlin.model import apply, forward, head_kernel

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
    """What the losses of a step are divided by: valid tokens, tokens with a successor, sequences with any."""
    at = targets(batch["tokens"], batch["segment_ids"])
    return {
        "tokens": jnp.sum(at.valid, dtype=jnp.float32),
        "next_tokens": jnp.sum(at.has_next, dtype=jnp.float32),
        "sequences": jnp.sum(jnp.any(at.valid, axis=1), dtype=jnp.float32),
    }


def layer_weights(stage: StageConfig, layers: int) -> jax.Array:
    """Weight of each layer's loss, [L]: 0 outside the aligned layers; 1, or 1 / |aligned| for a mean."""
    aligned = jnp.zeros(layers).at[jnp.array(stage.layers, int)].set(1) if stage.layers else jnp.ones(layers)
    return aligned / jnp.sum(aligned) if stage.layer_reduction == "mean" else aligned


def gradient_function(stage: StageConfig, student: ModelConfig, teacher: ModelConfig, remat: str) -> GradientFunction:
    """The stage's gradients and metrics, for one micro-batch."""
    if isinstance(stage, Stage3Config):
        return _end_to_end(stage, student, teacher, remat)
    assert isinstance(stage, Stage1Config | Stage2Config)
    return _layer_local(stage, student, teacher)


def _layer_local(stage: Stage1Config | Stage2Config, student: ModelConfig, teacher: ModelConfig) -> GradientFunction:
    """Stages 1 and 2: every student layer sees the teacher's residual stream, so gradients stay inside the layer."""
    layers, period = student.num_hidden_layers, student.period

    def gradients(trained, params, teacher_params, batch, count):
        valid = batch["segment_ids"] != 0

        def visit(student_layer, teacher_layer, xs):
            part, rest, weight, last = xs

            def loss(part):
                layer = student_layer({**rest, **part})
                if isinstance(stage, Stage1Config):
                    found, target = layer.mixed, teacher_layer.mixed
                    value = attention_output_loss(found, target, valid, count["tokens"], stage)
                else:
                    found, target = layer.output, teacher_layer.output
                    if stage.post_norm_target:
                        normed = apply(RMSNorm(teacher), teacher_params["norm"], target)
                        target = jnp.where(last, normed, target)
                    value = hidden_state_loss(found, target, valid, count["tokens"], stage)
                return weight * value, (value, *squares(found, target, valid))

            return jax.grad(loss, has_aux=True)(part)

        weights = layer_weights(stage, layers)
        per_layer = (trained["layers"], params["layers"], *(
            by_block(a, period) for a in (weights, jnp.arange(layers) == layers - 1)
        ))  # fmt: skip
        xs = {block: tuple(a[block] for a in per_layer) for block in params["layers"]}
        found = walk(teacher, student, teacher_params, batch, xs, visit)
        losses, error, power = by_layer({block: seen for block, (_, seen) in found.items()})
        metrics = {"loss": jnp.sum(weights * losses), "layer_loss": losses, "error": error, "power": power}
        return {"layers": {block: gradient for block, (gradient, _) in found.items()}}, metrics

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
        target = forward(teacher, teacher_params, tokens, segment_ids=segment_ids, logits=False).hidden

        weights = loss_weights(count["tokens"], count["next_tokens"], count["sequences"], stage)

        def loss(trained):
            out = forward(student, trained, tokens, segment_ids=segment_ids, logits=False, remat=remat)
            return distillation_loss(
                out.hidden,
                target,
                head_kernel(trained),
                head_kernel(teacher_params),
                at,
                weights,
                student,
                temperature=stage.temperature,
                chunk_tokens=stage.chunk_tokens,
            )

        (value, sums), gradient = jax.value_and_grad(loss, has_aux=True)(trained)
        metrics = {
            "loss": value,
            "kl": sums.kl / count["tokens"],
            "ce": sums.ce / jnp.maximum(count["next_tokens"], 1),
            "agreement": sums.agree / count["tokens"],
        }
        return gradient, metrics

    return gradients
