"""Turn a pretrained Transformer into a linear-time model, in JAX."""

import os
from importlib.metadata import version

# jaxlib 0.10.2 to 0.11 may sum wrongly, or crash, on CPUs where they hand sums of products to the YNN library
# (jax-ml/jax issues 39103 and 39257; DECISIONS.md, 15). The flag counts only before JAX first computes something.
_YNN = "--xla_cpu_experimental_ynn_fusion_type"
if (0, 10, 2) <= tuple(int(x) for x in version("jaxlib").split(".")[:3]) < (0, 12) and (
    _YNN not in os.environ.get("XLA_FLAGS", "")
):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_YNN}=".strip()

# Said at every import where torch is not installed, which is as it should be here.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
