"""Students: their architecture and their start from the teacher's weights."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxlin.config import MixerOptions, ModelConfig, RunConfig, UserError
from jaxlin.mixers import MIXERS, check_overrides, own_options, resolve_options
from jaxlin.mixers.common import heads_of_kv
from jaxlin.model import LanguageModel, init_params
from jaxlin.pattern import pattern_of

Path = tuple[Any, ...]  # of names
COPIED = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")


def student_config(run: RunConfig, teacher: ModelConfig) -> ModelConfig:
    """The teacher's architecture with the run's mixers. Raises UserError where the teacher is a student itself."""
    if teacher.mixer != ("softmax",):
        raise UserError(
            f"--teacher {run.teacher}: a student ({pattern_of(teacher.mixer)}), teachers have softmax attention"
        )
    options = tuple(resolve_options(mixer, run.preset, run.model) for mixer in run.period)
    check_overrides(run.period, run.model)
    student = replace(teacher, mixer=run.period, options=options, dtype=run.dtype)
    for mixer, chosen in zip(student.mixer, student.options, strict=True):
        if hasattr(MIXERS[mixer], "head_layout"):
            MIXERS[mixer].head_layout(student, chosen)  # refuses head counts that do not fit
    return student


@functools.lru_cache
def abstract_params(config: ModelConfig) -> Any:
    """Shapes of a model's parameters, boxed with their logical axes."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    return jax.eval_shape(LanguageModel(config).init, jax.random.key(0), tokens)["params"]


def is_new(path: Path) -> bool:
    """True for parameters that the teacher does not have."""
    return "mixer" in path and path[path.index("mixer") + 1] not in COPIED


def init_student(teacher_params: Any, config: ModelConfig, key: jax.Array) -> Any:
    """Parameters of a student: the teacher's where it has them, the mixer's own initialisation for the rest.

    Key and value heads are repeated where the student holds one for each query head (`expand_kv`). No array is the
    teacher's own: a training step takes the place of the student's.

    Raises ValueError where the teacher lacks a parameter of a name that is copied (COPIED), or has it in another shape.
    """
    fresh: dict[Path, Any] = flatten_dict(init_params(config, key))
    teacher = flatten_dict(teacher_params)
    student = {}
    for path, value in fresh.items():
        if not is_new(path):
            found = _from_teacher(path, teacher, config)
            if found is None or found.shape != value.shape:
                has = "no such parameter" if found is None else f"one of shape {found.shape}"
                raise ValueError(
                    f"{'/'.join(path)} has shape {value.shape}, and is to be copied from the teacher, which has {has}; "
                    f"in a mixer only what the teacher has may be called {', '.join(COPIED)}"
                )
            value = jnp.array(found, value.dtype, copy=True)
        student[path] = value
    return unflatten_dict(student)


def _from_teacher(path: Path, teacher: dict[Path, Any], config: ModelConfig) -> Any:
    if path[0] != "layers":
        return teacher.get(path)
    index = int(path[1].removeprefix("block_"))
    value = teacher.get(("layers", "block_0", *path[2:]))
    if value is None:
        return None
    value = value[index :: config.period]
    options = config.options[index]
    if path[-2] in ("k_proj", "v_proj") and config.mixer[index] != "softmax":
        value = expand_kv(value, heads_of_kv(config, options), bool(options.gqa_bug_compat))
    return value


def restored_layers(before: ModelConfig, now: ModelConfig) -> list[int] | None:
    """Layers that are softmax attention in the student `now` and another mixer in `before`, a student of the same
    teacher; None where other layers differ as well, or none is left as it was."""
    layers = range(now.num_hidden_layers)

    def built(config: ModelConfig, layer: int) -> tuple[str, MixerOptions]:
        place = layer % config.period
        return config.mixer[place], own_options(config.mixer[place], config.options[place])

    old, new = ([built(config, layer) for layer in layers] for config in (before, now))
    restored = [i for i in layers if old[i] != new[i]]
    possible = len(restored) < len(layers) and all(new[i][0] == "softmax" for i in restored)
    return restored if possible else None


def restore_attention(params: Any, before: ModelConfig, teacher_params: Any, now: ModelConfig) -> Any:
    """The parameters of `before` as those of `now`, a student that differs from it by `restored_layers` alone: these
    are the teacher's layers, attention and MLP."""
    restored = restored_layers(before, now) or ()

    def layer(i: int) -> Any:
        own = layer_params(params, before, i)
        if i not in restored:
            return own
        dtype = jax.tree.leaves(own)[0].dtype
        return jax.tree.map(lambda a: a[i].astype(dtype), teacher_params["layers"]["block_0"])

    rows = [layer(i) for i in range(now.num_hidden_layers)]
    blocks = {f"block_{i}": jax.tree.map(lambda *a: jnp.stack(a), *rows[i :: now.period]) for i in range(now.period)}
    return {**params, "layers": blocks}


def layer_params(params: Any, config: ModelConfig, layer: int) -> Any:
    """The parameters of one layer."""
    row, block = divmod(layer, config.period)
    return jax.tree.map(lambda a: a[row], params["layers"][f"block_{block}"])


def expand_kv(value: jax.Array, heads: int, bug_compat: bool = False) -> jax.Array:
    """[..., KV, d] -> [..., heads, d]: each head, repeated for the query heads that share it.

    With `bug_compat`, rows are repeated in blocks of 32 whatever the head size, as the authors' code does.
    """
    kv, size = value.shape[-2:]
    repeats = heads // kv
    if not bug_compat:
        return jnp.repeat(value, repeats, axis=-2)
    blocks = value.reshape(*value.shape[:-2], kv * size // 32, 32)
    return jnp.repeat(blocks, repeats, axis=-2).reshape(*value.shape[:-2], heads, size)
