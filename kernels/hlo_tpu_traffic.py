"""What a Pallas call moves and multiplies, read from its jaxpr, and what XLA does around it, read from compiled HLO.

The compiler's own cost analysis does not look inside a Pallas call.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from jax import lax
from jax.extend.core import jaxpr_as_fun
from jax.interpreters.partial_eval import dce_jaxpr

SCHEDULED = re.compile(r"^\s*(?:ROOT )?(%[\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$")
SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id"}
BITS = {"pred": 8, "bf16": 16, "f16": 16}


# ---- inside: the traced call ----


def pallas_calls(jaxpr: Any) -> Iterator[Any]:
    """Every Pallas call equation of a jaxpr, nested ones too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation
            continue
        for sub in _subjaxprs(equation):
            yield from pallas_calls(sub)


def call_name(call: Any) -> str:
    """A Pallas call's name."""
    return call.params["name"] if "name" in call.params else call.params["name_and_src_info"].name


def block_bytes(call: Any) -> int:
    """HBM bytes of all blocks fetched or written over the grid: those whose index differs from the step before.

    Where the indices are data (prefetched numbers choose the blocks, as in splash attention), every step counts.
    """
    mapping = call.params["grid_mapping"]
    if mapping.num_index_operands:
        blocks = (math.prod(_sizes(b)) * b.array_aval.dtype.itemsize for b in mapping.block_mappings)
        return math.prod(mapping.grid) * sum(blocks)
    steps = np.array(list(itertools.product(*(range(n) for n in mapping.grid))), np.int32)
    return sum(_visits(block, steps) for block in mapping.block_mappings)


def states_bytes(call: Any) -> int:
    """Bytes of the outputs that are saved for the backward pass: the states that chunks receive."""
    names = ("outputs['states']", "outputs['normalizers']")
    blocks = [b for b in call.params["grid_mapping"].block_mappings if str(b.origin) in names]
    return sum(math.prod(b.array_aval.shape) * b.array_aval.dtype.itemsize for b in blocks)


def stored_bytes(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Bytes of an array in HBM, where rows of heads are whole tiles of 128 lanes; gates are laid out along time."""
    lanes = shape[-1] if shape[-1] < 64 else -(-shape[-1] // 128) * 128
    return math.prod(shape[:-1]) * lanes * dtype.itemsize


def flops(call: Any, count_passes: bool) -> float:
    """Of the matrix products of a call; with `count_passes` weighted by the bfloat16 passes each takes."""
    return _repeats(call) * _flops(call.params["jaxpr"], count_passes)


def program_flops(jaxpr: Any) -> float:
    """Of the matrix products of a whole traced program, on all devices together; what nobody uses is left out."""
    used, _ = dce_jaxpr(jaxpr.jaxpr, [True] * len(jaxpr.jaxpr.outvars))
    return _flops(used, False)


def _visits(block: Any, steps: np.ndarray) -> int:
    index_map = jaxpr_as_fun(block.index_map_jaxpr)  # on all steps at once: it is arithmetic
    index = np.stack([np.broadcast_to(x, len(steps)) for x in index_map(*steps.T)], axis=1)
    changed = np.concatenate([[True], (index[1:] != index[:-1]).any(1)])
    shape = block.array_aval.shape
    sizes = _sizes(block)
    inside = np.minimum(sizes, np.array(shape) - index * np.array(sizes))  # blocks past the end are cut
    tile = (8 * 4 // block.array_aval.dtype.itemsize, 128)
    inside[:, -2:] = -(-inside[:, -2:] // tile) * tile  # HBM holds whole tiles
    return int(inside.prod(1)[changed].sum()) * block.array_aval.dtype.itemsize


def _sizes(block: Any) -> list[int]:
    """A block's size along each axis: 1 where the kernel does not see the axis."""
    sizes = (getattr(size, "block_size", size) for size in block.block_shape)
    return [size if isinstance(size, int) else 1 for size in sizes]


def _flops(jaxpr: Any, count_passes: bool) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            x = equation.invars[0].aval
            passes = 6 if count_passes and equation.params["precision"][0] == lax.Precision.HIGHEST else 1
            total += 2 * passes * math.prod(equation.outvars[0].aval.shape) * math.prod(x.shape[i] for i in contracted)
        total += _repeats(equation) * sum(_flops(sub, count_passes) for sub in _subjaxprs(equation))
    return total


def _repeats(equation: Any) -> int:
    """How often the program inside an equation runs: steps of a scan or a grid, devices of a shard_map."""
    if equation.primitive.name == "pallas_call":
        return math.prod(equation.params["grid_mapping"].grid)
    if equation.primitive.name == "shard_map":
        return math.prod(equation.params["mesh"].shape[axis] for axis in equation.params["newly_manual_axes"])
    return equation.params["length"] if equation.primitive.name == "scan" else 1


def _subjaxprs(equation: Any) -> Iterator[Any]:
    for value in equation.params.values():
        for item in value if isinstance(value, (tuple, list)) else [value]:
            item = getattr(item, "jaxpr", item)
            if hasattr(item, "eqns"):
                yield item


# ---- around: the compiled program ----


class Kernel(NamedTuple):
    name: str
    vmem: int  # bytes


class Around(NamedTuple):
    """An instruction of the entry computation that reads or writes HBM."""

    name: str
    bytes: int
    moves: bool  # it copies or transposes


def entry(text: str) -> tuple[list[Kernel], list[Around]]:
    """The Pallas kernels of a compiled program, and what runs around them."""
    kernels, around, written = [], [], {}
    lines = text[text.index("\nENTRY ") :].splitlines()[2:]
    for match in filter(None, map(SCHEDULED.match, lines)):
        name, shape, op, rest = match.groups()
        written[name] = shape_bytes(shape)
        if 'custom_call_target="tpu_custom_call"' in rest:
            kernels.append(Kernel(name, _vmem(rest)))
        elif op not in FREE and not op.endswith(("-start", "-done")) and "ConcatBitcast" not in rest:
            operands = re.findall(r"%[\w.-]+", rest.split("), ")[0])
            read = sum(written.get(operand, 0) for operand in operands)
            moves = op in ("copy", "transpose") or (op == "fusion" and bool(re.search("copy|transpose", name)))
            around.append(Around(name, written[name] + read, moves))
    return kernels, around


def kernel_names(text: str) -> list[str]:
    """The Pallas kernels of a whole compiled program, loops included: one name for each call."""
    calls = (line for line in text.splitlines() if re.search('custom_call_target="(tpu_custom_call|mosaic_gpu)', line))
    return [_kernel_name(line) for line in calls]


def _kernel_name(call: str) -> str:
    """A GPU's calls are named after JAX's primitive, which their op_name has behind the kernel's own."""
    name = plain_name(call.split(" = ")[0].split("%")[-1])
    found = re.search(rf'op_name="[^"]*?([^/"]+)/{name}"', call)
    return found[1] if found else name


def plain_name(name: str) -> str:
    """An instruction's name without its number: a Pallas call's own."""
    return re.sub(r"[.\d]+$", "", name.lstrip("%"))


def _vmem(custom_call: str) -> int:
    found = re.search(r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+","size":"(\d+)"', custom_call)
    return int(found[1]) if found else 0


def shape_bytes(shape: str, everywhere: bool = False) -> int:
    """Bytes of an HLO shape, or a tuple of them, that live in HBM: memory space S(1) is VMEM; or `everywhere`."""
    total = 0
    for dtype, sizes, layout in SHAPE.findall(shape):
        if everywhere or "S(" not in layout:
            bits = BITS.get(dtype) or int(re.sub(r"\D", "", dtype) or 0)
            total += math.prod(int(n) for n in sizes.split(",") if n) * bits // 8
    return total
