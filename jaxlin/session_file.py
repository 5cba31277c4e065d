"""A session in a file: what it holds, checked against damage and against the model that is to continue it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from jaxlin.command_line import from_dict, to_json
from jaxlin.config import ModelConfig, UserError
from jaxlin.drafts import draft
from jaxlin.model import layers_together

FORMAT = "jaxlin session 1"


def write(path: Path, config: ModelConfig, params: Any, numbers: dict[str, int], held: Any) -> None:
    """Write `numbers` and the arrays `held`, a nested dict, beside what `read` compares; whole or not at all."""
    tensors = {name(path): _bits(np.asarray(a)) for path, a in jax.tree.leaves_with_path(held)}
    about = {
        "format": FORMAT,
        "config": to_json(config),
        "params": fingerprint(params),
        "numbers": json.dumps(numbers),
    }
    data = save(tensors, metadata={**about, "checksum": _checksum(about, tensors)})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with draft(path) as part:
            part.write_bytes(data)
    except OSError as error:
        raise UserError(f"--save-state {path}: cannot be written ({error.strerror})") from None


def read(path: Path, config: ModelConfig, params: Any) -> tuple[dict[str, int], dict[str, np.ndarray]]:
    """What `write` was given, arrays by their names; bfloat16 as its bits."""
    flag = f"--load-state {path}"
    if not path.is_file():
        raise UserError(f"{flag}: no file there; --save-state writes one")
    try:
        with safe_open(path, framework="numpy") as file:
            about = dict(file.metadata() or {})
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{flag}: is damaged, or no saved session ({error}); save it again") from None
    if about.get("format") != FORMAT:
        raise UserError(f"{flag}: is no saved session of this version ({about.get('format')}); save it again")
    checksum = about.pop("checksum", "")
    if checksum != _checksum(about, tensors):
        raise UserError(f"{flag}: is damaged (its checksum differs); save it again")
    # Fields that are newer than the file count as their defaults.
    old, new = (json.loads(to_json(each)) for each in (from_dict(ModelConfig, json.loads(about["config"])), config))
    if different := [field for field in new if old[field] != new[field]]:
        field = different[0]
        raise UserError(f"{flag}: was saved by another model ({field} {old[field]}, here {new[field]})")
    if about["params"] != fingerprint(params):
        raise UserError(f"{flag}: was saved by this architecture with other parameters; give the model that wrote it")
    return json.loads(about["numbers"]), tensors


def fingerprint(params: Any) -> str:
    """A hash of all parameters, bit for bit: their sums as integers, each weighted by its place, computed in place.

    It does not matter whether layers are together or apart.
    """
    sums = jax.device_get(_sums(params))
    together = jax.eval_shape(layers_together, params)
    shapes = {name(path): (a.shape, str(a.dtype)) for path, a in jax.tree.leaves_with_path(together)}
    return hashlib.sha256(json.dumps([shapes, [int(s) for s in sums]]).encode()).hexdigest()


@jax.jit
def _sums(params):
    def weighted(a):
        bits = lax.bitcast_convert_type(a, f"uint{8 * a.dtype.itemsize}").astype(jnp.uint32).reshape(-1)
        return jnp.sum(bits * (2 * jnp.arange(bits.size, dtype=jnp.uint32) + 1), dtype=jnp.uint32)

    return [weighted(a) for a in jax.tree.leaves(layers_together(params))]


def name(path: Any) -> str:
    """What an array is called that has this path in a tree: state/layers/block_0/memory/0."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _bits(a: np.ndarray) -> np.ndarray:
    """Contiguous, and bfloat16, which NumPy's own types do not have, as its bits."""
    a = np.ascontiguousarray(a)
    return a.view(np.uint16) if a.dtype == jnp.bfloat16 else a


def _checksum(about: dict[str, str], tensors: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for key in sorted(tensors):
        digest.update(f"{key} {tensors[key].dtype} {tensors[key].shape}".encode())
        digest.update(np.ascontiguousarray(tensors[key]).tobytes())
    return digest.hexdigest()
