"""The device mesh and who lives where on it: the only module that names mesh axes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """The mesh (data, fsdp, tensor) over `devices` (default: all of this run's)."""
    devices = jax.devices() if devices is None else devices
    fixed = config.fsdp * config.tensor
    data = len(devices) // fixed if config.data == -1 else config.data
    if data * fixed != len(devices):
        raise UserError(
            f"--mesh.data {config.data} --mesh.fsdp {config.fsdp} --mesh.tensor {config.tensor}: "
            f"their product must be the {len(devices)} devices"
        )
    shape, types = (data, config.fsdp, config.tensor), (AxisType.Auto,) * 3
    try:
        return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)
    except NotImplementedError:  # an axis is no product of a torus' own axes: 32 x 2 of 4x4x4
        split = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return jax.sharding.Mesh(split, AXES, axis_types=types)


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


def summed_over_rows(function: Callable[[Any, Any], Any], rows: Any, whole: Any) -> Any:
    """function(rows, whole), a tree of sums over rows: each device's own rows [B, ...] first, then over devices.

    So `whole` is gathered once, however often `function` reads it, and its gradient is added up over devices once.
    """
    mesh = kernel_mesh()
    if mesh is None or any(x.shape[0] % batch_shards(mesh) for x in jax.tree.leaves(rows)):
        return function(rows, whole)

    def local(rows, whole):
        return jax.lax.psum(function(rows, whole), BATCH_AXES)

    specs = (PartitionSpec(BATCH_AXES), PartitionSpec())
    mapped = jax.shard_map(
        local, in_specs=specs, out_specs=PartitionSpec(), axis_names=set(BATCH_AXES), check_vma=False
    )
    return mapped(rows, whole)


def param_shardings(abstract: Any, mesh: jax.sharding.Mesh) -> Any:
    """Shardings of the parameters whose boxed shapes are `abstract`, from their logical axes."""
    specs = nn.get_partition_spec(abstract)
    shardings = nn.unbox(logical_to_mesh_sharding(specs, mesh, RULES))
    jax.tree.map(_check_divisible, nn.unbox(abstract), shardings)
    return shardings


def batch_sharding(mesh: jax.sharding.Mesh, axis: int = 0) -> NamedSharding:
    """Sharding of arrays whose axis number `axis` is the batch."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * axis, BATCH_AXES))


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Sharding of values that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_shards(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> int:
    """Number of shares a batch is divided into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def _check_divisible(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> None:
    for size, axes in zip(leaf.shape, sharding.spec, strict=False):
        for axis in axes if isinstance(axes, tuple) else (axes,):
            if axis is not None and size % sharding.mesh.shape[axis]:
                raise UserError(
                    f"--mesh.{axis} {sharding.mesh.shape[axis]} does not divide an axis of size {size} "
                    f"(of {leaf.shape}): use a divisor of {size}"
                )
