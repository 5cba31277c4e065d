"""Times of the GPU kernels' variants on one Hopper GPU: python benchmarks/hopper_tune.py [BxTxHxD ...]

Stages of the streams, and barriers that Pallas inserts by itself, which kernels that commit what they write may do
without. Needs jax and this repository on PYTHONPATH, nothing else. A faster variant still has to pass the ladder.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from jaxlin.kernels import (
    gated_delta_rule_gpu_bwd,
    gated_delta_rule_gpu_fwd,
    gated_delta_rule_gpu_op,
    gated_linear_attention_gpu_bwd,
    gated_linear_attention_gpu_fwd,
    gated_linear_attention_gpu_op,
    mlstm_gpu_op,
)

PARAMS = plgpu.CompilerParams
CALLS, LAUNCHES, REPEATS = 5, 4, 7


def without_barriers(**options):
    return PARAMS(**options, unsafe_no_auto_barriers=True)


# variant: (module, attribute, value)
VARIANTS = {
    "as committed": (),
    "A forward 2 stages": (gated_linear_attention_gpu_fwd, "STAGES", {64: 2, 128: 2}),
    "A forward 4 stages": (gated_linear_attention_gpu_fwd, "STAGES", {64: 4, 128: 3}),
    "A backward 3 stages": (gated_linear_attention_gpu_bwd, "STAGES", 3),
    "B forward 3 stages": (gated_delta_rule_gpu_fwd, "STAGES", 3),
    "B backward 3 stages": (gated_delta_rule_gpu_bwd, "STAGES", 3),
    "no automatic barriers": (plgpu, "CompilerParams", without_barriers),
}


def programs(shape: tuple[int, int, int, int]) -> dict:
    """(function, arguments) by name; gates differentiated where they vary."""
    b, t, h, d = shape
    keys = jax.random.split(jax.random.key(0), 5)
    q, k, v = (jax.random.normal(key, (b, t, h, d), jnp.bfloat16) / 8 for key in keys[:3])
    gate = jax.nn.log_sigmoid(jax.random.normal(keys[3], (b, t, h)) + 3)
    beta = jax.nn.sigmoid(jax.random.normal(keys[4], (b, t, h)))
    a, delta, scale = gated_linear_attention_gpu_op.pallas, gated_delta_rule_gpu_op.pallas, d**-0.5
    return {
        "linear attention": (lambda q, k, v: a(q, k, v, scale=scale)[0], (q, k, v)),
        "scalar gate": (lambda q, k, v, g: a(q, k, v, g, scale=scale)[0], (q, k, v, gate)),
        "mLSTM": (lambda q, k, v, i, f: mlstm_gpu_op.pallas(q, k, v, i, f, scale=scale)[0], (q, k, v, gate, beta + 3)),
        "DeltaNet": (lambda q, k, v, w: delta(q, k, v, w, None, scale=scale)[0], (q, k, v, beta)),
        "Gated DeltaNet": (lambda q, k, v, w, g: delta(q, k, v, w, g, scale=scale)[0], (q, k, v, beta, gate)),
    }


def milliseconds(function, args, backward: bool) -> float:
    """Median time of a call."""

    def once(args):
        if not backward:
            return function(*args)
        o, vjp = jax.vjp(function, *args)
        return vjp(o)

    @jax.jit
    def program(args):
        for _ in range(CALLS):
            out = once(args)
            args, out = jax.lax.optimization_barrier((args, out))
        return out

    jax.block_until_ready(program(args))
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready([program(args) for _ in range(LAUNCHES)])
        times.append((time.perf_counter() - start) / CALLS / LAUNCHES * 1e3)
    return statistics.median(times)


def main() -> None:
    shapes = sys.argv[1:] or ["32x512x32x64", "1x32768x32x64"]
    for shape in (tuple(map(int, s.split("x"))) for s in shapes):
        for name, (function, args) in programs(shape).items():
            for variant, change in VARIANTS.items():
                family = "B" if "Delta" in name else "A"
                if variant[:2] in ("A ", "B ") and variant[0] != family:
                    continue
                old = getattr(*change[:2]) if change else None
                if change:
                    setattr(*change)
                jax.clear_caches()
                try:
                    times = "  ".join(f"{milliseconds(function, args, backward):8.3f}" for backward in (False, True))
                except Exception as error:  # a variant may not fit
                    times = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
                finally:
                    if change:
                        setattr(*change[:2], old)
                print(f"{'x'.join(map(str, shape)):<15}{name:<18}{variant:<24}{times}", flush=True)


if __name__ == "__main__":
    main()
