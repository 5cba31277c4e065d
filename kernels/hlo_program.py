"""What a compiled program moves, read from its HLO text: through HBM, and over the network between devices.

The compiler's own cost analysis counts the body of a loop once; a training step is a loop over layers.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from jaxlin.kernels.hlo_tpu_traffic import FREE, SCHEDULED, plain_name, shape_bytes

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "collective-permute", "all-to-all")
COMPUTATION = re.compile(r"^(ENTRY )?(%[\w.-]+) \(.*\{$")
UNMOVED = FREE | {"while", "conditional", "call", "optimization-barrier", "domain", "replica-id"}
FUSIONS = ("fusion", "fusion-start")  # the second runs beside others, on a GPU
ANNOTATIONS = ("ConcatBitcast", "AssumeGatherIndicesInBound")  # custom calls that move nothing


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    shape: str
    op: str
    operands: list[str]
    rest: str
    root: bool

    def attribute(self, name: str) -> str:
        """The text of an attribute (`body`, `calls`); empty where it is absent."""
        found = re.search(rf"\b{name}=(%[\w.-]+|\d+|\S+?)(?=[,\s]|$)", self.rest)
        return found[1] if found else ""


Computation = dict[str, Instruction]


class Collective(NamedTuple):
    """All collectives of one kind in one run of a program."""

    calls: float
    """How often one starts, loops included."""
    sent: float
    """Bytes that each device sends, as rings do: (n - 1) / n of an array for a gather or scatter among n devices."""


class Program:
    """A compiled program's computations, and how often a run executes each of them."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, Computation] = {}
        entry, body = "", {}
        for line in text.splitlines():
            if head := COMPUTATION.match(line):
                body = self.computations[head[2]] = {}
                entry = head[2] if head[1] else entry
            elif found := SCHEDULED.match(line):
                name, shape, op, rest = found.groups()
                operands = re.findall(r"%[\w.-]+", rest.split(")")[0])
                body[name] = Instruction(name, shape, op, operands, rest, "ROOT " in line[: found.start(1)])
        partitions = re.search(r"num_partitions=(\d+)", text[: text.find("\n")])
        self.devices = int(partitions[1]) if partitions else 1
        self.runs: dict[str, float] = defaultdict(float)
        """Runs of each computation, fused ones included. A loop whose end is not a constant counts once."""
        self.scheduled = {entry}
        """The computations whose instructions run one by one: all but the fused."""
        self._count(entry, 1.0)

    def _count(self, name: str, times: float) -> None:
        self.runs[name] += times
        for x in self.computations[name].values():
            if x.op == "while":
                inner, each = [x.attribute("body"), x.attribute("condition")], times * self.trips(x)
            elif x.op == "conditional":  # every branch: an upper bound
                branches = re.search(r"branch_computations=\{([^}]*)\}", x.rest)
                names = branches[1].split(", ") if branches else []
                inner, each = names or [x.attribute(f"{case}_computation") for case in ("true", "false")], times
            elif x.op in ("call", *FUSIONS, "async-start"):
                inner, each = [x.attribute("calls") or x.attribute("to_apply")], times
            else:
                continue
            if x.op not in FUSIONS:
                self.scheduled.update(inner)
            for called in inner:
                if called in self.computations:
                    self._count(called, each)

    def trips(self, loop: Instruction) -> int:
        """How often a loop runs its body: the limit that its counter, from 0, is compared with, over its step."""
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
            return int(known[1])
        condition = self.computations[loop.attribute("condition")]
        body = self.computations[loop.attribute("body")]
        test = _root(condition)
        if test.op == "fusion":
            inner = _root(self.computations[test.attribute("calls")])
            test = test._replace(rest=inner.rest, op=inner.op)
        limits = [_constant(condition[o]) for o in test.operands if condition[o].op == "constant"]
        counters = [condition[o].attribute("index") for o in test.operands if condition[o].op == "get-tuple-element"]
        if test.op != "compare" or "direction=LT" not in test.rest or len(limits) != 1 or len(counters) != 1:
            return 1
        root = _root(body)
        step = self._step(body, root.operands[int(counters[0])], {}) if root.op == "tuple" else None
        return -(-limits[0] // (step or 1))

    def _step(self, computation: Computation, name: str, given: Mapping[str, int]) -> int | None:
        """The sum of the constants on the way from a loop's counter to `name`; None where it is no such sum."""
        x = computation[name]
        if x.op == "constant":
            return _constant(x)
        if x.op == "parameter":
            return given.get(name)
        if x.op == "get-tuple-element" and computation[x.operands[0]].op == "parameter":
            return 0  # the counter itself, of which a loop's step has one
        if x.op == "get-tuple-element" and computation[x.operands[0]].op == "fusion":
            return self._fused_step(computation, computation[x.operands[0]], int(x.attribute("index")), given)
        if x.op == "fusion":
            return self._fused_step(computation, x, None, given)
        if x.op in ("copy", "bitcast", "copy-done", "copy-start"):
            return self._step(computation, x.operands[0], given)
        if x.op == "add":
            parts = [self._step(computation, o, given) for o in x.operands]
            return None if None in parts else sum(p for p in parts if p is not None)
        return None

    def _fused_step(self, outer: Computation, x: Instruction, index: int | None, given: Mapping[str, int]):
        inner = self.computations[x.attribute("calls")]
        known = {p.name: self._step(outer, x.operands[int(p.rest.split(")")[0])], given)
                 for p in inner.values() if p.op == "parameter"}  # fmt: skip
        root = _root(inner)
        name = root.name if index is None else root.operands[index]
        return self._step(inner, name, {k: v for k, v in known.items() if v is not None})

    # ---- over the network ----

    def collectives(self) -> dict[str, Collective]:
        """What a run sends between devices, by kind."""
        total = {kind: Collective(0, 0) for kind in COLLECTIVES}
        for (kind, _), (times, name, x) in self._distinct().items():
            sent = self._sent(kind, self.computations[name], x)
            total[kind] = Collective(total[kind].calls + times, total[kind].sent + times * sent)
        return {kind: x for kind, x in total.items() if x.calls}

    def _distinct(self) -> dict[tuple[str, str], tuple[float, str, Instruction]]:
        """Each collective's runs, computation and instruction, by kind and channel.

        One that runs beside several fusions stands in each of them, with the same channel.
        """
        found: dict[tuple[str, str], tuple[float, str, Instruction]] = {}
        for name, times in self.runs.items():
            for x in self.computations[name].values():
                kind = x.op.removesuffix("-start")
                if kind in COLLECTIVES:
                    if kind == "all-reduce" and "all-reduce-scatter" in name:  # as the TPU compiler fuses one
                        kind = "reduce-scatter"
                    key = kind, x.attribute("channel_id") or f"{name} {x.name}"
                    if key not in found or found[key][0] < times:
                        found[key] = times, name, x
        return found

    def _sent(self, kind: str, computation: Computation, x: Instruction) -> float:
        n = group_size(x.rest, self.devices)
        operands = sum(shape_bytes(computation[o].shape, everywhere=True) for o in x.operands)
        result = shape_bytes(x.shape, everywhere=True)
        if kind == "all-gather":
            whole = result - operands if x.op.endswith("-start") else result  # which also names its operands
            return whole * (n - 1) / n
        if kind == "collective-permute":
            return operands
        return operands * (n - 1) / n * (2 if kind == "all-reduce" else 1)

    # ---- through HBM ----

    def hbm_bytes(self, kernels: Mapping[str, float]) -> float:
        """Bytes that a run reads from and writes to the memory of one device.

        Each instruction reads its operands once and writes its result once, where they live in HBM; slices are read
        and written alone. `kernels` has the bytes of one run of each Pallas call that is known, by name.
        """
        total = 0.0
        for name in self.scheduled & self.runs.keys():
            total += self.runs[name] * sum(self.moved(name, x, kernels) for x in self.computations[name].values())
        fused = (found for found in self._distinct().values() if found[1] not in self.scheduled)
        return total + sum(times * shape_bytes(x.shape) for times, _, x in fused)

    def moved(self, name: str, x: Instruction, kernels: Mapping[str, float] = MappingProxyType({})) -> float:
        """Bytes that one run of an instruction of the computation `name` reads and writes."""
        computation = self.computations[name]
        if x.op in UNMOVED or x.op.endswith(("-done", "-update")):
            return 0
        if x.op == "custom-call" and any(free in x.rest for free in ANNOTATIONS):
            return 0
        if x.op == "custom-call" and (known := kernels.get(plain_name(x.name))) is not None:
            return known
        if x.op in ("copy-start", "collective-permute-start"):
            return shape_bytes(x.shape)  # names the source too
        if x.op == "slice-start":
            source, part = computation[x.operands[0]].shape, x.shape.split("), ")[-1]
            return shape_bytes(part) + (shape_bytes(part, everywhere=True) if shape_bytes(source) else 0)
        if x.op in FUSIONS:
            return self._fused(computation, x)
        if x.op in ("dynamic-slice", "slice", "gather"):
            return 2 * shape_bytes(x.shape)
        if x.op == "dynamic-update-slice":
            return 2 * shape_bytes(computation[x.operands[1]].shape)
        return shape_bytes(x.shape) + sum(shape_bytes(computation[o].shape) for o in x.operands)

    def _fused(self, computation: Computation, x: Instruction) -> float:
        inner = self.computations[x.attribute("calls")]
        users: dict[str, list[Instruction]] = defaultdict(list)
        for y in inner.values():
            for operand in y.operands:
                users[operand].append(y)
        read = 0.0
        for p in inner.values():
            if p.op == "parameter":
                whole = shape_bytes(computation[x.operands[int(p.rest.split(")")[0])]].shape)
                read += min(whole, _read(p.name, users)) if whole else 0
        root = _root(inner)
        outputs = [inner[o] for o in root.operands] if root.op == "tuple" else [root]
        return read + sum(_written(y, inner) for y in outputs)


def group_size(rest: str, devices: int) -> int:
    """Devices that a collective spans, from its replica groups; all of them where it names none."""
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(found[1])
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return len(found[1].split(","))
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    return devices


def _root(computation: Computation) -> Instruction:
    return next(x for x in computation.values() if x.root)


def _constant(x: Instruction) -> int:
    found = re.match(r"(-?\d+)\)", x.rest)
    return int(found[1]) if found else 0


def _read(name: str, users: Mapping[str, Iterable[Instruction]]) -> float:
    """Bytes that a fusion reads of a parameter: slices of it, or all."""
    total = 0.0
    for y in users.get(name, ()):
        if y.op in ("dynamic-slice", "slice", "gather") and y.operands[0] == name:
            total += shape_bytes(y.shape, everywhere=True)
        elif y.op in ("bitcast", "get-tuple-element"):
            total += _read(y.name, users)
        elif not (y.op == "tuple" or (y.op == "dynamic-update-slice" and y.operands[0] == name)):
            return math.inf  # all of it
    return total


def _written(y: Instruction, inner: Computation) -> float:
    """Bytes that a fusion writes of one output: the slice that changes, none of what it hands on, or all.

    A collective's result is counted with the collective, which may stand in several fusions.
    """
    while y.op == "bitcast":
        y = inner[y.operands[0]]
    if y.op == "dynamic-update-slice":
        return shape_bytes(inner[y.operands[1]].shape, everywhere=True) if shape_bytes(y.shape) else 0
    return 0 if y.op in ("parameter", "get-tuple-element", *COLLECTIVES) else shape_bytes(y.shape)
