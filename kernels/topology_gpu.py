"""Hopper GPUs to compile for that are not here: XLA's plugin for CUDA is a compiler too."""

from __future__ import annotations

import os
import re
from importlib import metadata
from typing import Any

import jax
from jax.experimental import topologies

from jaxlin.kernels.topology import GPUS, Chip

NETWORK_CARD_GB_PER_S = 400 / 8
"""Out of one GPU to other hosts: a card of 400 Gb/s for each, as in DGX and HGX systems."""
# What XLA asks of a GPU of compute capability 9.0, in the form of its GpuTargetConfigProto: NVIDIA's CUDA programming
# guide, table of technical specifications, and H100 whitepaper.
HOPPER = """
gpu_device_info {{
  name: "{kind}" device_vendor: "NVIDIA Corporation" platform_version: "Compute Capability 9.0a"
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 l2_cache_size: 52428800
  memory_bandwidth: {bandwidth} device_memory_size: {memory} device_address_bits: 64 ecc_enabled: true
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_core: 233472 shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  driver_version: "13.0.0" runtime_version: "12.8.0" compile_time_toolkit_version: "12.8.0" dnn_version: "9.10.0"
  device_interconnect_info {{ active_links: 18 }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{kind}"
"""


def chip(topology: str) -> Chip:
    """The figures of the GPUs of "h100:8" or "h100:2x8" (hosts x GPUs); between hosts the network is slower.

    Raises ValueError where the name or the numbers are not known.
    """
    name, hosts, _ = _parse(topology)
    board = GPUS[name]
    return board if hosts == 1 else board._replace(network_gb_per_s=NETWORK_CARD_GB_PER_S)


def devices(topology: str) -> Any:
    """The devices of "h100:8" or "h100:2x8", to compile for. Raises ValueError where the compiler is not installed."""
    name, hosts, gpus = _parse(topology)
    if compiler() is None:
        raise ValueError(f"{topology}: needs XLA's compiler for GPUs: pip install 'jaxlin[gpu]', which needs no GPU")
    if "JAX_PLATFORMS" not in os.environ:
        jax.config.update("jax_platforms", "cpu")  # else JAX looks for GPUs here
    board = GPUS[name]
    config = HOPPER.format(kind=board.kind, bandwidth=int(board.hbm_gb_per_s * 1e9), memory=int(board.hbm_gib * 2**30))
    described = topologies.get_topology_desc(platform="cuda", target_config=config, topology=f"1x{hosts}x{gpus}")
    return described.devices


def compiler() -> str | None:
    """The package of XLA's plugin for CUDA that is installed, if any."""
    for name in ("jax-cuda13-plugin", "jax-cuda12-plugin"):
        if any(metadata.distributions(name=name)):
            return name
    return None


def _parse(topology: str) -> tuple[str, int, int]:
    """Name, hosts, GPUs on each."""
    found = re.fullmatch(r"(\w+):(?:([1-9]\d*)x)?([1-9]\d*)", topology)
    if found is None or found[1] not in GPUS:
        names = " or ".join(f"{name}:8" for name in GPUS)
        raise ValueError(f"{topology}: give the GPUs of a host, {names}, or hosts x GPUs, h100:2x8")
    return found[1], int(found[2] or 1), int(found[3])
