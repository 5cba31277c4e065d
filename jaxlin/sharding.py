"""The device mesh and who lives where on it: the only module that names mesh axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from flax import linen as nn
from flax.linen.spmd import logical_to_mesh_sharding
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxlin.config import MeshConfig, UserError

BATCH_AXES = ("data", "fsdp")
TIME_AXIS = "sequence"
HEAD_AXIS = "tensor"
AXES = (*BATCH_AXES, TIME_AXIS, HEAD_AXIS)

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
    """The mesh (data, fsdp, sequence, tensor) over `devices` (default: all of this run's)."""
    devices = jax.devices() if devices is None else devices
    _require_positive(config)
    sizes = {axis: getattr(config, axis) for axis in AXES if axis != "data"}
    count, fixed = len(devices), math.prod(sizes.values())
    if count % fixed:
        flags = [f"--mesh.{axis} {size}" for axis, size in sizes.items() if size > 1]
        product = f" (together {fixed})" if len(flags) > 1 else ""
        raise UserError(f"{' '.join(flags)}{product}: must divide the {count} devices: use {_choices(count)}")
    data = count // fixed if config.data == -1 else config.data
    if data * fixed != count:
        raise UserError(f"--mesh.data {data}: {count} devices with {_by_axis(sizes)} need {count // fixed}, or -1")
    shape, types = (data, *sizes.values()), (AxisType.Auto,) * len(AXES)
    try:
        return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)
    except NotImplementedError:  # an axis is no product of a torus' own axes: 32 x 2 of 4x4x4
        split = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return jax.sharding.Mesh(split, AXES, axis_types=types)


def describe(mesh: jax.sharding.Mesh) -> str:
    """The mesh in words: 8 devices (data 1 x fsdp 8 x sequence 1 x tensor 1)."""
    return f"{mesh.size} devices ({_by_axis(mesh.shape)})" if mesh.size > 1 else "1 device"


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


def require_divides_time(seq_len: int, config: MeshConfig, devices: int) -> None:
    """Refuse a mesh whose `sequence` axis does not divide the length of sequences, and name the sizes that do."""
    _require_positive(config)
    shards = getattr(config, TIME_AXIS)
    if seq_len % shards:
        use = _choices(math.gcd(devices, seq_len))
        raise UserError(
            f"--mesh.{TIME_AXIS} {shards}: must divide the sequence length {seq_len} (--data.seq-len): use {use}"
        )


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


def _by_axis(sizes: Mapping[str, int]) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items())


def _listed(items: Sequence[str], word: str) -> str:
    return f" {word} ".join((", ".join(items[:-1]), items[-1])) if len(items) > 1 else items[0]


def kernel_mesh() -> jax.sharding.AbstractMesh | None:
    """The mesh that a kernel call must be mapped over, or None where there is nothing to map, or where it has been."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if mesh.axis_names == AXES and mesh.size > 1 and not mesh.are_all_axes_manual else None


class Layout(NamedTuple):
    """The mesh axes that arrays [B, T, H, ...] are split over. A size that they do not divide stays whole."""

    batch: tuple[str, ...]
    time: str | None
    heads: str | None

    def by_token(self, *axes: str | None) -> PartitionSpec:
        """Of arrays [B, T, ...] whose third axis is split over `axes`, if any."""
        return PartitionSpec(self.batch, self.time, *axes)


def layout(batch: int, length: int, heads: int) -> Layout | None:
    """How a device's share of [batch, length, heads, ...] is cut out, or None where there is nothing to cut."""
    mesh = kernel_mesh()
    if mesh is None:
        return None
    rows, shards = (), 1
    for axis in BATCH_AXES:
        if batch % (shards * mesh.shape[axis]) == 0:
            rows, shards = (*rows, axis), shards * mesh.shape[axis]
    return Layout(rows, time_axis(length), None if heads % mesh.shape[HEAD_AXIS] else HEAD_AXIS)


def time_axis(length: int) -> str | None:
    """The mesh axis over which `length` tokens are split: none where it has one device or does not divide them."""
    return None if pieces(length) == 1 else TIME_AXIS


def pieces(length: int) -> int:
    """The number of pieces that `length` tokens are cut into."""
    mesh = kernel_mesh()
    size = 1 if mesh is None else mesh.shape[TIME_AXIS]
    return 1 if length % size else size


def by_tokens(x: jax.Array) -> jax.Array:
    """Keep x [B, T, ...] and its gradient split over the batch axes and `sequence`, where they divide it.

    Left to itself, the compiler may split activations as parameters are, along the width: then every device works on
    the whole batch, and sums of whole activations cross the network instead of parameters.
    """
    mesh, time = kernel_mesh(), time_axis(x.shape[1])
    if mesh is None:
        return x
    rows = PartitionSpec.UNCONSTRAINED if x.shape[0] % batch_shards(mesh) else BATCH_AXES
    if rows is PartitionSpec.UNCONSTRAINED and time is None:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(rows, time))


def whole_sequences(x: jax.Array) -> jax.Array:
    """x [B, T, ...] with all of T on every device along `sequence`; its other axes stay as they are."""
    if time_axis(x.shape[1]) is None:
        return x
    free = PartitionSpec.UNCONSTRAINED
    return jax.lax.with_sharding_constraint(x, PartitionSpec(free, None, *(free,) * (x.ndim - 2)))


def on_every_device(tree: Any) -> Any:
    """Keep small results whole on every device, where every process can read them."""
    if kernel_mesh() is None:
        return tree
    return jax.tree.map(lambda a: jax.lax.with_sharding_constraint(a, PartitionSpec()), tree)


def over_tokens(function: Callable[[Any, Any], tuple[Any, Any, Any]], tokens: Any, whole: Any) -> tuple[Any, Any, Any]:
    """function(tokens, whole) -> (sums over tokens, outputs by token [B, T, ...], gradients [D, ...] of `whole`).

    Each device calls it with its own rows, and its own piece of them along `sequence`, and adds up sums and gradients
    with the others once: so `whole` is gathered once too, however often `function` reads it. Gradients stay split along
    their first axis, over fsdp.
    """
    mesh = kernel_mesh()
    batch, length = jax.tree.leaves(tokens)[0].shape[:2]
    time = time_axis(length)
    rows = () if mesh is None or batch % batch_shards(mesh) else BATCH_AXES
    axes = (*rows, time) if time else rows
    # XLA cannot compile the sum over axes of one device each beside an axis of several.
    if mesh is None or math.prod(mesh.shape[axis] for axis in axes) == 1:
        return function(tokens, whole)

    def local(tokens, whole):
        sums, by_token, gradients = function(tokens, whole)
        sums, gradients = jax.lax.psum((sums, gradients), axes)
        return sums, by_token, gradients

    by_token, everywhere = PartitionSpec(rows, time), PartitionSpec()
    mapped = jax.shard_map(
        local, in_specs=(by_token, everywhere), out_specs=(everywhere, by_token, everywhere),
        axis_names=set(axes), check_vma=False,
    )  # fmt: skip
    sums, outputs, gradients = mapped(tokens, whole)
    split = PartitionSpec("fsdp", PartitionSpec.UNCONSTRAINED)
    return sums, outputs, jax.tree.map(lambda a: jax.lax.with_sharding_constraint(a, split), gradients)


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
