"""Shared test set-up, chosen before JAX starts: eight fake CPU devices, and quick compilation of slower programs."""

import os
from pathlib import Path

import pytest

FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

MAPS = Path("/proc/self/maps")


@pytest.fixture(autouse=True)
def forget_programs():
    """Drop compiled programs before they exhaust the memory maps a process may have, where XLA's compiler crashes."""
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > 20_000:
        import jax

        jax.clear_caches()
