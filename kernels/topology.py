"""Published figures of chips, and devices to compile for that are not here: `libtpu` is a compiler too."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies


class Chip(NamedTuple):
    """Published figures of one device."""

    hbm_gb_per_s: float
    bf16_tflops: float
    hbm_gib: float
    network_gb_per_s: float
    """Out of one device, over all its links to others of the slice or the host."""
    kind: str
    """JAX's name of the device, or how it begins."""


# cloud.google.com/tpu/docs/{v5e,v5p,v6e,tpu7x}; a TPU7x chip is two devices. Networks are published both ways together.
CHIPS = {
    "v5e": Chip(819, 197, 16, 400 / 2, "TPU v5 lite"),
    "v5p": Chip(2765, 459, 95, 1200 / 2, "TPU v5"),
    "v6e": Chip(1640, 918, 32, 800 / 2, "TPU v6 lite"),
    "tpu7x": Chip(7380 / 2, 2307 / 2, 192 / 2, 1200 / 2 / 2, "TPU7x"),
}
# nvidia.com's data sheets of the SXM modules, without sparsity; memory as their driver counts it. Other boards of these
# chips have other rates and names.
GPUS = {
    "h100": Chip(3350, 989, 84_942_979_072 / 2**30, 900 / 2, "NVIDIA H100 80GB HBM3"),
    "h200": Chip(4800, 989, 151_397_597_184 / 2**30, 900 / 2, "NVIDIA H200"),
}


def chip(topology: str) -> Chip:
    """The chip of a topology, "v5e:4x4". Raises ValueError for one that is not known."""
    name = topology.split(":")[0]
    if name not in CHIPS:
        raise ValueError(f"{topology}: the chip must be one of {', '.join(CHIPS)}")
    return CHIPS[name]


def chip_of(device: Any) -> Chip | None:
    """The figures of a device that is here; None where they are not known, as for CPUs."""
    known = [chip for chip in (*CHIPS.values(), *GPUS.values()) if device.device_kind.startswith(chip.kind)]
    return max(known, key=lambda chip: len(chip.kind), default=None)


def published_flops(devices: Iterable[Any]) -> float:
    """bfloat16 flop/s of devices of one kind together, at the published rate; NaN where that is not known."""
    devices = list(devices)
    chip = chip_of(devices[0])
    return chip.bf16_tflops * 1e12 * len(devices) if chip else math.nan


def devices(topology: str) -> Any:
    """The devices of a topology, to compile for. Raises ValueError where the compiler or the topology is not known."""
    chip(topology)
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no TPU machine to ask for metadata
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # one a process: none of them opens a device
    if "JAX_PLATFORMS" not in os.environ:
        jax.config.update("jax_platforms", "cpu")  # else JAX looks for TPUs here
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except RuntimeError as error:
        reason = "needs libtpu: pip install 'jaxlin[tpu]'" if "not installed" in str(error) else str(error)
        raise ValueError(f"{topology}: {reason}") from error
