"""The GPU kernels on a Hopper GPU, smallest first, each in its own process: a hang or a crash costs seconds.

python benchmarks/hopper_ladder.py [--only WORD] [--timeout SECONDS] [--jobs N]

Needs jax, numpy and this repository on PYTHONPATH, nothing else. One line a step: errors against the float64
definition over what tests/grid.py allows, or how the step failed. Logs of failed steps go to $OUT (or .).
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.grid import Case

A, B, M = "gated_linear_attention", "gated_delta_rule", "mlstm"
BASE = Case(T=320, K=64, V=64, B=2, H=3, HV=3, strength="mild", state=False)
ONE = replace(BASE, T=64, B=1, H=1, HV=1)

# name: (op, case, normalize), from the simplest on
STEPS: dict[str, tuple] = {
    "tiles": (),
    "A none, one chunk": (A, replace(ONE, gate="none")),
    "A none": (A, replace(BASE, gate="none")),
    "A none, initial state": (A, replace(BASE, gate="none", state=True)),
    "A none, HV = 2H, ragged": (A, replace(BASE, gate="none", HV=6, T=301)),
    "A constant": (A, replace(BASE, gate="constant")),
    "A scalar": (A, replace(BASE, gate="scalar")),
    "A scalar, mixed gates": (A, replace(BASE, gate="scalar", strength="mixed")),
    "A none, segments": (A, replace(BASE, gate="none", segments="packed")),
    "A scalar, gaps, state": (A, replace(BASE, gate="scalar", segments="gaps", state=True)),
    "A normalized": (A, replace(BASE, gate="none"), True),
    "A normalized, gaps, state": (A, replace(BASE, gate="none", segments="gaps", state=True), True),
    "mLSTM": (M, replace(BASE, strength="weak")),
    "mLSTM, gaps, state": (M, replace(BASE, strength="weak", segments="gaps", state=True)),
    "A none, in parts": (A, replace(BASE, gate="none", T=4096, B=1)),
    "A scalar, in parts, packed": (A, replace(BASE, gate="scalar", T=4096, B=1, segments="packed")),
    "A normalized, in parts": (A, replace(BASE, gate="none", T=4096, B=1), True),
    "mLSTM, in parts": (M, replace(BASE, strength="weak", T=4096, B=1)),
    "A scalar, 128": (A, replace(BASE, gate="scalar", K=128, V=128)),
    "A normalized, 128": (A, replace(BASE, gate="none", K=128, V=128), True),
    "mLSTM, 128": (M, replace(BASE, strength="weak", K=128, V=128)),
    "GLA, one chunk": (A, replace(ONE, gate="channel")),
    "GLA": (A, replace(BASE, gate="channel")),
    "GLA, mixed gates": (A, replace(BASE, gate="channel", strength="mixed")),
    "GLA, strong gates": (A, replace(BASE, gate="channel", strength="strong")),
    "GLA, HV = 2H, ragged, state": (A, replace(BASE, gate="channel", HV=6, T=301, state=True)),
    "GLA, gaps, state": (A, replace(BASE, gate="channel", segments="gaps", state=True)),
    "GLA, in parts, packed": (A, replace(BASE, gate="channel", T=4096, B=1, segments="packed")),
    "GLA, V = 128": (A, replace(BASE, gate="channel", V=128)),
    "GLA, 128": (A, replace(BASE, gate="channel", K=128, V=128)),
    "B none, one chunk": (B, replace(ONE, gate="none")),
    "B none": (B, replace(BASE, gate="none")),
    "B none, correlated": (B, replace(BASE, gate="none", corr=0.9, beta=1.0)),
    "B scalar": (B, replace(BASE, gate="scalar")),
    "B scalar, gaps, state": (B, replace(BASE, gate="scalar", segments="gaps", state=True, HV=6)),
    "B none, in parts": (B, replace(BASE, gate="none", T=4096, B=1)),
    "B scalar, in parts, packed": (B, replace(BASE, gate="scalar", T=4096, B=1, segments="packed")),
    "B scalar, 128": (B, replace(BASE, gate="scalar", K=128, V=128)),
    "KDA, one chunk": (B, replace(ONE, gate="channel")),
    "KDA": (B, replace(BASE, gate="channel")),
    "KDA, mixed gates": (B, replace(BASE, gate="channel", strength="mixed")),
    "KDA, strong gates": (B, replace(BASE, gate="channel", strength="strong")),
    "KDA, weak gates": (B, replace(BASE, gate="channel", strength="weak")),
    "KDA, correlated": (B, replace(BASE, gate="channel", corr=0.9, beta=1.0)),
    "KDA, HV = 2H, ragged, state": (B, replace(BASE, gate="channel", HV=6, T=301, state=True)),
    "KDA, gaps, state": (B, replace(BASE, gate="channel", segments="gaps", state=True)),
    "KDA, in parts, packed": (B, replace(BASE, gate="channel", T=4096, B=1, segments="packed")),
    "KDA, V = 128": (B, replace(BASE, gate="channel", V=128)),
    "KDA, 128": (B, replace(BASE, gate="channel", K=128, V=128)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="steps whose name holds this")
    parser.add_argument("--timeout", type=float, default=120, help="seconds a step may take")
    parser.add_argument("--jobs", type=int, default=4, help="steps at a time")
    parser.add_argument("--step", help="run one step in this process")
    args = parser.parse_args()
    if args.step is not None:
        step(args.step)
        return
    names = [name for name in STEPS if args.only in name]
    with ThreadPoolExecutor(args.jobs) as pool:
        results = list(pool.map(functools.partial(in_process, timeout=args.timeout), names))
    print(f"{sum(results)} of {len(results)} steps passed")
    sys.exit(0 if all(results) else 1)


def in_process(name: str, timeout: float) -> bool:
    """Run a step in a process of its own; True if it passed."""
    start = time.perf_counter()
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    try:
        done = subprocess.run(
            [sys.executable, __file__, "--step", name], capture_output=True, text=True, timeout=timeout, env=environment
        )
        output, good = done.stdout + done.stderr, done.returncode == 0
        last = (done.stdout if good else output).strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
    except subprocess.TimeoutExpired as error:
        output, good = str(error.stdout) + str(error.stderr), False
        last = [f"no end within {timeout:.0f} s"]
    if not good:
        log = Path(os.environ.get("OUT", ".")) / f"failed_{re.sub('[^A-Za-z0-9]+', '_', name)}.log"
        log.write_text(output)
    print(f"{'ok ' if good else 'BAD'} {name:<28}{time.perf_counter() - start:5.0f} s  {last[0][:160]}", flush=True)
    return good


def step(name: str) -> None:
    """Run a step here; exits with 1 if an error is too large."""
    import jax

    interpreted = os.environ.get("JAXLIN_INTERPRET") == "gpu"  # to try this script itself
    assert interpreted or jax.devices()[0].platform == "gpu", f"no GPU: {jax.devices()}"
    errors, limits = tiles() if name == "tiles" else against_definition(*STEPS[name])
    print(" ".join(f"{n} {e:.1e}{'' if e <= limits[n] else '!'}" for n, e in errors.items()))
    sys.exit(0 if all(e <= limits[n] for n, e in errors.items()) else 1)  # which NaN is not


def against_definition(op: str, case: Case, normalize: bool = False) -> tuple[dict, dict]:
    """Errors of outputs and gradients, and what is allowed."""
    import jax.numpy as jnp
    import numpy as np

    from tests import grid

    args = grid.inputs(op, case, normalize)
    if op == M:  # n.q must not pass through zero
        args["q"], args["k"] = np.abs(args["q"]), np.abs(args["k"])
    args = grid.rounded(args, jnp.bfloat16)
    function = FUNCTIONS[op]
    expected = grid.outputs_and_gradients(function, args, jnp.float64, implementation="scan")
    found = grid.outputs_and_gradients(function, args, jnp.bfloat16, implementation="pallas")
    again = grid.outputs_and_gradients(function, args, jnp.bfloat16, implementation="pallas")
    errors = {n: grid.error(found[n], expected[n]) for n in expected if n != "dinitial_state2"}
    errors["rerun"] = max(float(np.abs(found[n] - again[n]).max()) for n in found)
    limits = {n: grid._limit(n, jnp.bfloat16, case.corr > 0) for n in errors if n != "rerun"}
    return errors, limits | {"rerun": 1e-30}


def _function(op: str):
    """An op by its definition or its kernel, without what jaxlin.ops imports besides."""

    def run(*, implementation: str, **args):
        import importlib

        from jaxlin import recurrence

        if implementation == "scan":
            return getattr(recurrence, op)(**({"initial_state": _zero_state(op, args)} | args))
        kernel = importlib.import_module(f"jaxlin.kernels.{op}_gpu_op").pallas
        return kernel(**({"g": None} if op == B and "g" not in args else {}), **args, scale=args["q"].shape[-1] ** -0.5)

    return run


def _zero_state(op: str, args: dict):
    import jax.numpy as jnp

    (batch, _, heads, value_dim), key_dim = args["v"].shape, args["q"].shape[-1]
    dtype = jnp.promote_types(args["q"].dtype, jnp.float32)
    shapes = ((batch, heads, key_dim, value_dim), (batch, heads, key_dim), (batch, heads))
    parts = tuple(jnp.zeros(s, dtype) for s in shapes)
    return parts if op == M else parts[:2] if args.get("normalize") else parts[0]


FUNCTIONS = {op: _function(op) for op in (A, B, M)}


def tiles() -> tuple[dict, dict]:
    """What all kernels stand on, by itself: copies, products in every orientation, sums, vectors, the stream."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxlin.kernels import mosaic_gpu as gpu
    from jaxlin.kernels import mosaic_gpu_registers as registers
    from jaxlin.kernels.tile_gpu_sums import SUMS, column_sums

    chunks, stages, size = 5, 2, registers.CHUNK
    shape = jax.ShapeDtypeStruct
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.normal(size=(2, chunks * size, 3, size)), jnp.bfloat16) for _ in range(2))
    names = ("nn", "nt", "tn", "rn")
    out = [shape((2, 3, chunks, size, size), jnp.bfloat16) for _ in names]
    out += [shape((2, 3, chunks, 2, size), jnp.float32), shape((2, 3, size, size), jnp.float32)]

    def tiles(index, inputs, outputs, buffers):
        b, h = index
        xs, ys, staged, sums, scratch, barrier = buffers

        def chunk(n, slot, refill, total):
            a, b_ = xs.at[slot], ys.at[slot]
            gpu.wait_out(0)
            refill()
            products = (gpu.dot(a, b_), gpu.dot(a, b_, tb=True), gpu.dot(a, b_, ta=True))
            products += (gpu.dot(gpu.load(a).astype(jnp.bfloat16), b_, gpu.load(b_)),)
            for i, product in enumerate(products):
                gpu.put(staged.at[jnp.int32(i)], product)
            sums.at[0][...] = jnp.sum(gpu.load(a), 1)
            sums.at[1][...] = column_sums(gpu.load(a), scratch)
            copies = [(staged.at[jnp.int32(i)], outputs[i].at[b, h, n]) for i in range(4)]
            gpu.copy_out(*copies, (sums, outputs[4].at[b, h, n]))
            return gpu.dot(a, b_, total, ta=True)

        sources = [
            (lambda n: inputs[0].at[b, gpu.chunk_rows(n), h], xs),
            (lambda n: inputs[1].at[b, gpu.chunk_rows(n), h], ys),
        ]
        zero = registers.zeros(size, size)
        outputs[5].at[b, h][...] = gpu.stream(sources, barrier, chunk, zero, chunks=chunks, stages=stages)
        gpu.wait_out(0)

    scratch = [gpu.tile(stages, size, size), gpu.tile(stages, size, size), gpu.tile(4, size, size)]
    scratch += [gpu.vector(2, size), gpu.vector(SUMS * size), gpu.barrier(2, stages)]
    found = jax.jit(lambda *a: gpu.launch(tiles, a, out, (2, 3), scratch))(x, y)
    a, b = (
        np.asarray(t.astype(jnp.float32), np.float64).reshape(2, chunks, size, 3, size).transpose(0, 3, 1, 2, 4)
        for t in (x, y)
    )
    expected = [a @ b, a @ b.swapaxes(-1, -2), a.swapaxes(-1, -2) @ b, a @ b + b]
    expected += [np.stack([a.sum(-1), a.sum(-2)], -2), (a.swapaxes(-1, -2) @ b).sum(2)]
    errors = {
        n: float(np.linalg.norm(np.asarray(f.astype(jnp.float32)) - e) / np.linalg.norm(e))
        for n, f, e in zip((*names, "sums", "total"), found, expected, strict=True)
    }
    return errors, dict.fromkeys(names, 4e-3) | {"sums": 1e-5, "total": 1e-5}


if __name__ == "__main__":
    main()
