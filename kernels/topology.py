"""TPUs that are not here: their published figures, and devices to compile for. `libtpu` is a compiler too."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies


class Chip(NamedTuple):
    """Published figures of one device."""

    hbm_gb_per_s: float
    bf16_tflops: float
    hbm_gib: float


# cloud.google.com/tpu/docs/{v5e,v5p,v6e,tpu7x}; a TPU7x chip is two devices.
CHIPS = {
    "v5e": Chip(819, 197, 16),
    "v5p": Chip(2765, 459, 95),
    "v6e": Chip(1640, 918, 32),
    "tpu7x": Chip(7380 / 2, 2307 / 2, 192 / 2),
}


def chip(topology: str) -> Chip:
    """The chip of a topology, "v5e:4x4". Raises ValueError for one that is not known."""
    name = topology.split(":")[0]
    if name not in CHIPS:
        raise ValueError(f"{topology}: the chip must be one of {', '.join(CHIPS)}")
    return CHIPS[name]


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
