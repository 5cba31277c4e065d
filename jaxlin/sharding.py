"""Names of the mesh axes; the only file that names them."""

from __future__ import annotations

import jax

BATCH_AXES = ("data", "fsdp")
HEAD_AXIS = "tensor"


def kernel_mesh() -> jax.sharding.AbstractMesh | None:
    """The current mesh if it has one of our axes, else None."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if any(a in mesh.axis_names for a in (*BATCH_AXES, HEAD_AXIS)) else None
