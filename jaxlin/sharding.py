"""The device mesh and who lives where on it: the only module that names mesh axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from flax import linen as nn
from flax.linen.spmd import logical_to_mesh_sharding
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxlin.config import MeshConfig, UserError

BATCH_AXES = ("data", "fsdp")
HEAD_AXIS = "tensor"
AXES = (*BATCH_AXES, HEAD_AXIS)

# Logical axes of parameters (model.py, mixers/) -> mesh axes.
RULES = (
    ("layers", None),
    ("embed", "fsdp"),
    ("heads", HEAD_AXIS),
    ("mlp", HEAD_AXIS),
    ("vocab", HEAD_AXIS),
    ("head_dim", None),
)
# What users call the axes that a mesh may divide.
WORDS = {"heads": "heads", "embed": "width", "mlp": "MLP width", "vocab": "vocabulary"}


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """The mesh (data, fsdp, tensor) over `devices` (default: all of this run's)."""
    devices = jax.devices() if devices is None else devices
    _require_positive(config)
    count, fixed = len(devices), config.fsdp * config.tensor
    if count % fixed:
        flags = [f"--mesh.{axis} {size}" for axis in ("fsdp", "tensor") if (size := getattr(config, axis)) > 1]
        product = f" (together {fixed})" if len(flags) > 1 else ""
        raise UserError(f"{' '.join(flags)}{product}: must divide the {count} devices: use {_choices(count)}")
    data = count // fixed if config.data == -1 else config.data
    if data * fixed != count:
        raise UserError(
            f"--mesh.data {data}: {count} devices with fsdp {config.fsdp} x tensor {config.tensor} "
            f"need {count // fixed}, or -1"
        )
    shape, types = (data, config.fsdp, config.tensor), (AxisType.Auto,) * 3
    try:
        return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)
    except NotImplementedError:  # an axis is no product of a torus' own axes: 32 x 2 of 4x4x4
        split = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return jax.sharding.Mesh(split, AXES, axis_types=types)


def describe(mesh: jax.sharding.Mesh) -> str:
    """The mesh in words: 8 devices (data 1 x fsdp 8 x tensor 1)."""
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    return f"{mesh.size} devices ({axes})" if mesh.size > 1 else "1 device"


def require_divides(models: Iterable[Any], config: MeshConfig, devices: int) -> None:
    """Refuse a mesh that does not divide models whose boxed shapes are `models`, and name the sizes that do."""
    _require_positive(config)
    models, rules = list(models), dict(RULES)
    for axis in (HEAD_AXIS, "fsdp"):
        sizes = {s: None for model in models for s in _sizes(model, lambda name, axis=axis: rules.get(name) == axis)}
        shards = getattr(config, axis)
        if wrong := [f"{size} {word}" if word.endswith("heads") else f"{word} {size}"
                     for word, size in sizes if size % shards]:  # fmt: skip
            use = _choices(math.gcd(devices, *(size for _, size in sizes)))
            raise UserError(f"--mesh.{axis} {shards}: must divide the {_listed(wrong, 'and')}: use {use}")


def _sizes(model: Any, chosen: Callable[[str], bool]) -> list[tuple[str, int]]:
    """(what, size) of the axes of a model's parameters whose logical name is chosen: heads first."""
    specs = jax.tree.leaves(nn.get_partition_spec(model), is_leaf=lambda s: isinstance(s, PartitionSpec))
    found = []
    for (path, leaf), spec in zip(jax.tree.leaves_with_path(nn.unbox(model)), specs, strict=True):
        keys_or_values = any(name in jax.tree_util.keystr(path) for name in ("k_proj", "v_proj"))
        for name, size in zip(spec, leaf.shape, strict=False):
            if name is not None and chosen(name):
                found.append((name, size, keys_or_values))
    most = max((size for name, size, _ in found if name == "heads"), default=0)
    found.sort(key=lambda f: (list(WORDS).index(f[0]), -f[1]))
    return [("key/value heads" if kv and size < most else WORDS[name], size) for name, size, kv in found]


def _require_positive(config: MeshConfig) -> None:
    for axis in AXES:
        size = getattr(config, axis)
        if size < 1 and (axis, size) != ("data", -1):
            raise UserError(f"--mesh.{axis} {size}: must be at least 1{', or -1' if axis == 'data' else ''}")


def divisors(number: int) -> list[int]:
    """The divisors of a number: the sizes that an axis of a mesh may have."""
    return [n for n in range(1, number + 1) if number % n == 0]


def _choices(number: int) -> str:
    """The divisors of a number, as a choice: 1, 2, 4 or 8."""
    return _listed([str(n) for n in divisors(number)], "or")


def _listed(items: Sequence[str], word: str) -> str:
    return f" {word} ".join((", ".join(items[:-1]), items[-1])) if len(items) > 1 else items[0]


def kernel_mesh() -> jax.sharding.AbstractMesh | None:
    """The mesh that a kernel call must be mapped over, or None where there is nothing to map."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if mesh.axis_names == AXES and mesh.size > 1 else None


def by_rows(x: jax.Array) -> jax.Array:
    """Keep x [B, ...] and its gradient split over the batch axes, where the mesh has several and they divide B.

    Left to itself, the compiler may split activations as parameters are, along the width: then every device works on
    the whole batch, and sums of whole activations cross the network instead of parameters.
    """
    mesh = kernel_mesh()
    if mesh is None or x.shape[0] % batch_shards(mesh):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES))


def on_every_device(tree: Any) -> Any:
    """Keep small results whole on every device, where every process can read them."""
    if kernel_mesh() is None:
        return tree
    return jax.tree.map(lambda a: jax.lax.with_sharding_constraint(a, PartitionSpec()), tree)


def over_rows(function: Callable[[Any, Any], tuple[Any, Any, Any]], rows: Any, whole: Any) -> tuple[Any, Any, Any]:
    """function(rows, whole) -> (sums over rows, outputs by row [B, ...], gradients [D, ...] of what is in `whole`).

    Each device calls it with its own rows and adds up sums and gradients with the others once: so `whole` is gathered
    once too, however often `function` reads it. Gradients stay split along their first axis, over fsdp.
    """
    mesh = kernel_mesh()
    shards = 1 if mesh is None else batch_shards(mesh)
    # XLA cannot compile the sum over axes of one device each beside an axis of several.
    if shards == 1 or any(x.shape[0] % shards for x in jax.tree.leaves(rows)):
        return function(rows, whole)

    def local(rows, whole):
        sums, by_row, gradients = function(rows, whole)
        sums, gradients = jax.lax.psum((sums, gradients), BATCH_AXES)
        return sums, by_row, gradients

    specs = (PartitionSpec(BATCH_AXES), PartitionSpec())
    out_specs = (PartitionSpec(), PartitionSpec(BATCH_AXES), PartitionSpec())
    mapped = jax.shard_map(local, in_specs=specs, out_specs=out_specs, axis_names=set(BATCH_AXES), check_vma=False)
    sums, by_row, gradients = mapped(rows, whole)
    split = PartitionSpec("fsdp", PartitionSpec.UNCONSTRAINED)
    return sums, by_row, jax.tree.map(lambda a: jax.lax.with_sharding_constraint(a, split), gradients)


def param_shardings(abstract: Any, mesh: jax.sharding.Mesh) -> Any:
    """Shardings of the parameters whose boxed shapes are `abstract`, from their logical axes."""
    specs = nn.get_partition_spec(abstract)
    require_divides([abstract], MeshConfig(**mesh.shape), mesh.size)
    return nn.unbox(logical_to_mesh_sharding(specs, mesh, RULES))


def batch_sharding(mesh: jax.sharding.Mesh, axis: int = 0) -> NamedSharding:
    """Sharding of arrays whose axis number `axis` is the batch."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * axis, BATCH_AXES))


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Sharding of values that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_shards(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> int:
    """Number of shares a batch is divided into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]
