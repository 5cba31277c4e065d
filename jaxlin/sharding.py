"""The device mesh and who lives where on it: the only module that names mesh axes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import linen as nn
from flax.linen.spmd import logical_to_mesh_sharding
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
    return jax.make_mesh((data, config.fsdp, config.tensor), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


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
