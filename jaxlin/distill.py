"""The three stages: what trains, on what input, with which loss (paper, section 3)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxlin.config import ModelConfig, Stage1Config, Stage2Config, Stage3Config, StageConfig
from jaxlin.layer_local import Batch, by_block, by_layer, walk
from jaxlin.losses import Targets, attention_output_loss, distillation_loss, hidden_state_loss, loss_weights, targets
from jaxlin.mixers.common import RMSNorm
from jaxlin.model import apply, forward, head_kernel

Metrics = dict[str, jax.Array]
# (trained parameters, all student parameters, teacher parameters, batch, step-wide counts) -> (gradients, metrics)
GradientFunction = Callable[[Any, Any, Any, Batch, Any], tuple[Any, Metrics]]
# The same for several students: a tuple with one entry for each, wherever a student's own is meant.
JointGradientFunction = Callable[[Any, Any, Any, Batch, Any], tuple[tuple[Any, ...], tuple[Metrics, ...]]]


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
    """What the losses of a step are divided by: valid tokens, tokens with a successor, sequences with any.

    Where a batch says which tokens are `learned`, both count the tokens with one of those for a successor.
    """
    at = targets_of(batch)
    return {
        "tokens": jnp.sum(at.valid, dtype=jnp.float32),
        "next_tokens": jnp.sum(at.has_next, dtype=jnp.float32),
        "sequences": jnp.sum(jnp.any(at.valid, axis=1), dtype=jnp.float32),
    }


def targets_of(batch: Batch) -> Targets:
    """The `targets` of a batch, which may say which tokens are learned."""
    return targets(batch["tokens"], batch["segment_ids"], batch.get("learned"))


def needs_teacher(stage: StageConfig) -> bool:
    """Whether a stage compares with the teacher: all do but cross-entropy alone."""
    return not isinstance(stage, Stage3Config) or stage.kl_weight != 0


def layer_weights(stage: StageConfig, layers: int) -> jax.Array:
    """Weight of each layer's loss, [L]: 0 outside the aligned layers; 1, or 1 / |aligned| for a mean."""
    aligned = jnp.zeros(layers).at[jnp.array(stage.layers, int)].set(1) if stage.layers else jnp.ones(layers)
    return aligned / jnp.sum(aligned) if stage.layer_reduction == "mean" else aligned


def gradient_function(stage: StageConfig, student: ModelConfig, teacher: ModelConfig, remat: str) -> GradientFunction:
    """The stage's gradients and metrics of one student, for one micro-batch."""
    together = joint_gradient_function(stage, (student,), teacher, remat)

    def gradients(trained, params, teacher_params, batch, count):
        (found,), (metrics,) = together((trained,), (params,), teacher_params, batch, count)
        return found, metrics

    return gradients


def joint_gradient_function(
    stage: StageConfig, students: Sequence[ModelConfig], teacher: ModelConfig, remat: str
) -> JointGradientFunction:
    """The stage's gradients and metrics of every student, for one micro-batch that the teacher sees once."""
    if isinstance(stage, Stage3Config):
        return _end_to_end(stage, students, teacher, remat)
    assert isinstance(stage, Stage1Config | Stage2Config)
    return _layer_local(stage, students, teacher)


def _layer_local(
    stage: Stage1Config | Stage2Config, students: Sequence[ModelConfig], teacher: ModelConfig
) -> JointGradientFunction:
    """Stages 1 and 2: every student layer sees the teacher's residual stream, so gradients stay inside the layer."""
    layers = teacher.num_hidden_layers

    def gradients(trained, params, teacher_params, batch, count):
        valid = batch["segment_ids"] != 0
        weights = layer_weights(stage, layers)

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

        def layer_inputs(student, trained, params):
            per_layer = (trained["layers"], params["layers"], *(
                by_block(a, student.period) for a in (weights, jnp.arange(layers) == layers - 1)
            ))  # fmt: skip
            return {block: tuple(a[block] for a in per_layer) for block in params["layers"]}

        def results(found):
            losses, error, power = by_layer({block: seen for block, (_, seen) in found.items()})
            metrics = {"loss": jnp.sum(weights * losses), "layer_loss": losses, "error": error, "power": power}
            return {"layers": {block: gradient for block, (gradient, _) in found.items()}}, metrics

        xs = [layer_inputs(*own) for own in zip(students, trained, params, strict=True)]
        found = walk(teacher, students, teacher_params, batch, xs, visit)
        return _of_every_student(results(own) for own in found)

    return gradients


def _of_every_student(pairs: Iterable[tuple[Any, Metrics]]) -> tuple[tuple[Any, ...], tuple[Metrics, ...]]:
    """(gradients, metrics) of each student -> gradients of all, metrics of all."""
    found, metrics = zip(*pairs, strict=True)
    return found, metrics


def squares(student, teacher, valid) -> tuple[jax.Array, jax.Array]:
    """Sums over tokens and width of the squared error and of the teacher's square: their quotient is the NMSE."""
    student, teacher = (jnp.where(valid[..., None], a.astype(jnp.float32), 0) for a in (student, teacher))
    return jnp.sum((student - teacher) ** 2), jnp.sum(teacher**2)


def _end_to_end(
    stage: Stage3Config, students: Sequence[ModelConfig], teacher: ModelConfig, remat: str
) -> JointGradientFunction:
    """Stage 3: KL to the teacher's next-token distribution, and cross-entropy, through the whole student.

    Cross-entropy alone needs no teacher, which then does not run.
    """
    compares = needs_teacher(stage)
    hidden = functools.partial(forward, logits=False, packed=True, unroll=stage.unroll)

    def gradients(trained, params, teacher_params, batch, count):
        del params  # all of them are trained
        tokens, segment_ids = batch["tokens"], batch["segment_ids"]
        at = targets_of(batch)
        target, kernel = None, None
        if compares:
            target = hidden(teacher, teacher_params, tokens, segment_ids=segment_ids).hidden
            kernel = head_kernel(teacher_params)
        weights = loss_weights(count["tokens"], count["next_tokens"], count["sequences"], stage)

        def learn(student, trained):
            def loss(trained):
                out = hidden(student, trained, tokens, segment_ids=segment_ids, remat=remat)
                return distillation_loss(
                    out.hidden,
                    target,
                    head_kernel(trained),
                    kernel,
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
            return gradient, metrics if compares else {name: metrics[name] for name in ("loss", "ce")}

        return _of_every_student(learn(*own) for own in zip(students, trained, strict=True))

    return gradients
