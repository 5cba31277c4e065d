"""Shared test set-up, chosen before JAX starts: eight fake CPU devices, and quick compilation of slower programs."""

import gc
import os
import shutil
from pathlib import Path

import pytest

from tests.quick_xla import QUICK

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 {QUICK}"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
gc.set_threshold(100_000, 20, 100)  # tracing makes many objects and little garbage

MAPS = Path("/proc/self/maps")


@pytest.fixture(autouse=True)
def forget_programs():
    """Drop compiled programs before they exhaust the memory maps a process may have, where XLA's compiler crashes."""
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > 20_000:
        import jax

        jax.clear_caches()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A good HF folder of a tiny Llama: safetensors, config and tokenizer."""
    from jaxlin.convert import export_hf
    from tests.tiny_llama import BIASED, random_params, word_tokenizer

    path = tmp_path_factory.mktemp("teacher") / "tiny"
    export_hf(random_params(BIASED), BIASED, path, tokenizer=word_tokenizer(48))
    return path


@pytest.fixture
def copy(folder, tmp_path):
    """A copy of the good folder, to break."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))
