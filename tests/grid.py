"""Test cases and tolerances shared by the op tests: the one place where either is written down.

A case is a dict of ops arguments in float64 numpy, a cover of the corners rather than a product of all settings: keys
correlated up to identical, gates from 0 to -50 mixed over time and channels, beta 0 and 2, segments of length 1,
padding on the left, in the middle and on the right, chunks of nothing but padding, ragged T, more value than key
heads, K != V.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Relative RMS error against the float64 definition, by input dtype. Float32 may also be 3 times the error that the
# definition itself makes in float32 (rows whose denominator nearly vanishes are ill-conditioned).
FLOAT64 = 1e-10
FLOAT32 = 2e-5
FLOAT32_VS_SCAN = 3.0
BFLOAT16 = {"o": 4e-3, "q": 8e-3, "k": 8e-3, "v": 8e-3, "g": 1e-2, "beta": 1e-2, "i": 1e-2, "f": 1e-2, "state": 8e-3}
BFLOAT16_CORRELATED = 1.5e-2


@dataclass(frozen=True)
class Case:
    """One point of the grid; `gate` is none | constant | scalar | channel, `segments` a key of SEGMENTS."""

    T: int = 65
    H: int = 1
    HV: int = 1
    K: int = 16
    V: int = 16
    B: int = 2
    gate: str = "scalar"
    strength: str = "mixed"  # weak | mild | mixed | strong | zero: sizes of the log decay
    corr: float = 0.0  # correlation of the keys; 1 makes them identical
    beta: float | None = None  # None: uniform in (0, 1); else this value everywhere
    segments: str = "none"
    state: bool = True
    seed: int = 0

    def __str__(self) -> str:
        default = Case()
        changed = {f: v for f, v in vars(self).items() if v != getattr(default, f)}
        return "-".join(f"{f}{v}" for f, v in changed.items()) or "default"


def segment_ids(kind: str, batch: int, time: int, rng: np.random.Generator) -> np.ndarray | None:
    """[B, T] ids, different in every row; 0 is padding."""
    if kind == "none":
        return None
    if kind == "packed":  # lengths from 1 up, ids in increasing order
        ends = np.sort(rng.random((batch, max(1, time // 8))) * time, axis=1)
        return 1 + (np.arange(time)[None, :, None] >= ends[:, None, :]).sum(-1)
    if kind == "single":  # every token its own segment
        return np.tile(np.arange(1, time + 1), (batch, 1))
    ids = np.ones((batch, time), int)
    third = max(1, time // 3)
    if kind == "left":
        ids[:, :third] = 0
    elif kind == "right":
        ids[:, -third:] = 0
    elif kind == "middle":  # the same document continues behind its padding
        ids[:, third : 2 * third] = 0
    elif kind == "gaps":  # several documents, reused ids, padding of every kind, one row of nothing else
        ids = rng.integers(0, 3, (batch, time)).repeat(3, axis=1)[:, :time]
        ids[0] = 0
    else:
        raise ValueError(f"no segments of kind {kind!r}")
    return ids


def log_decay(strength: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Log decays <= 0; "mixed" puts 0, weak, mild and very strong ones side by side in time, heads and channels."""
    weak, mild = -1e-3 * rng.random(shape), -rng.random(shape)
    strong = -20 - 30 * rng.random(shape)
    choice = rng.random(shape)
    mixed = np.select([choice < 0.1, choice < 0.4, choice < 0.9], [0.0, weak, mild], strong)
    return {"zero": np.zeros(shape), "weak": weak, "mild": mild, "mixed": mixed, "strong": strong}[strength]


def inputs(op: str, case: Case, normalize: bool = False) -> dict[str, Any]:
    """Arguments of `ops.<op>` in float64: arrays (initial_state and segment_ids included) and options."""
    c, rng = case, np.random.default_rng(case.seed)

    def keys(heads):
        shared = rng.normal(size=(c.B, 1, heads, c.K))
        x = np.sqrt(1 - c.corr) * rng.normal(size=(c.B, c.T, heads, c.K)) + np.sqrt(c.corr) * shared
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    q, k = rng.normal(size=(c.B, c.T, c.H, c.K)), keys(c.H)
    if normalize:
        q, k = np.abs(q), np.abs(k)
    args: dict[str, Any] = dict(q=q, k=k, v=rng.normal(size=(c.B, c.T, c.HV, c.V)))
    per_head = (c.B, c.T, c.HV)
    if op == "gated_delta_rule":
        args["beta"] = rng.random(per_head) if c.beta is None else np.full(per_head, c.beta)
    if op == "mlstm":
        args["i"] = {"weak": 0.1, "mild": 1.0}.get(c.strength, 5.0) * rng.normal(size=per_head)
        decay = log_decay(c.strength, per_head, rng)
        args["f"] = np.where(decay > -1e-12, 40.0, -np.log(np.expm1(np.maximum(-decay, 1e-12))))  # the inverse of it
    elif c.gate != "none":
        shape = {"constant": (c.HV,), "scalar": per_head, "channel": (*per_head, c.K)}[c.gate]
        args["g"] = log_decay(c.strength, shape, rng)
    if c.state:
        s = rng.normal(size=(c.B, c.HV, c.K, c.V))
        z = np.abs(rng.normal(size=(c.B, c.HV, c.K)))
        m = rng.normal(size=(c.B, c.HV))
        args["initial_state"] = (s, z, m) if op == "mlstm" else (s, z) if normalize else s
    args["segment_ids"] = segment_ids(c.segments, c.B, c.T, rng)
    return args | (dict(normalize=True) if normalize else {})


def outputs_and_gradients(op: Callable, args: dict[str, Any], dtype: Any, **options: Any) -> dict[str, np.ndarray]:
    """o, the final state and the gradient of every array, through o and the final state, as float64 numpy by name.

    The cotangents are fixed random numbers, the inputs are cast to `dtype`; gates and states stay at least float32.
    The definition runs on the CPU: on a GPU each of its steps is several kernels, and tests run side by side.
    """
    floats, segments, normalize = _split(args)
    wide = jnp.promote_types(dtype, jnp.float32)
    device = jax.devices("cpu")[0] if options.get("implementation") == "scan" else None
    with jax.enable_x64(dtype == jnp.float64), jax.default_device(device):
        floats = {
            n: jax.tree.map(lambda x, d=(dtype if n in "qkv" else wide): jnp.asarray(x, d), x)
            for n, x in floats.items()
        }
        segments = None if segments is None else jnp.asarray(segments, jnp.int32)
        run = _compiled(op, tuple(sorted((options | normalize).items())))
        (o, state), gradients = run(floats, segments)
        found = {"o": o} | _named("state", state) | {f"d{n}": x for n, x in gradients.items() if n != "initial_state"}
        found |= _named("dinitial_state", gradients.get("initial_state", ()))
        return {n: np.asarray(x.astype(wide), np.float64) for n, x in found.items()}


@functools.cache
def _compiled(op: Callable, options: tuple) -> Callable:
    """One jitted function for all cases of the same shapes: compiling is what takes time here."""

    @jax.jit
    def run(floats, segments):
        out, vjp = jax.vjp(lambda xs: op(**xs, segment_ids=segments, **dict(options)), floats)
        cotangents = [_cotangent(x, seed) for seed, x in enumerate(jax.tree.leaves(out))]
        return out, vjp(jax.tree.unflatten(jax.tree.structure(out), cotangents))[0]

    return run


def _split(args: dict[str, Any]) -> tuple[dict[str, Any], np.ndarray | None, dict[str, bool]]:
    """Arrays to differentiate, segment ids, options."""
    floats = {n: x for n, x in args.items() if x is not None and n not in ("segment_ids", "normalize")}
    return floats, args["segment_ids"], {n: args[n] for n in ("normalize",) if n in args}


def error(found: np.ndarray, expected: np.ndarray) -> float:
    """RMS of the error over the RMS of what is expected; 0 / 0 is 0, and NaN or Inf is infinite."""
    if not np.isfinite(found).all():
        return np.inf
    difference = np.sqrt(np.mean((found - expected) ** 2))
    return 0.0 if difference == 0 else float(difference / max(np.sqrt(np.mean(expected**2)), 1e-30))


def rounded(args: dict[str, Any], dtype: Any) -> dict[str, Any]:
    """The same case with q, k and v rounded to `dtype` and the rest to float32: what that dtype is compared with."""
    if dtype == jnp.float64:
        return args
    floats, segments, normalize = _split(args)
    casts = {n: dtype if n in "qkv" else np.float32 for n in floats}
    floats = {n: jax.tree.map(lambda x, n=n: np.asarray(x, casts[n]).astype(np.float64), x) for n, x in floats.items()}
    return floats | dict(segment_ids=segments) | normalize


def check(
    op: Callable, args: dict[str, Any], dtype: Any, *, correlated: bool = False, skip: tuple = (), **options: Any
) -> None:
    """Assert outputs and gradients, all but `skip`, of the chunked form against the float64 definition."""
    args = rounded(args, dtype)
    expected = outputs_and_gradients(op, args, jnp.float64, implementation="scan")
    found = outputs_and_gradients(op, args, dtype, **(dict(implementation="chunked") | options))
    expected = {n: x for n, x in expected.items() if n not in skip}
    errors = {n: error(found[n], expected[n]) for n in expected}
    limits = {n: _limit(n, dtype, correlated) for n in expected}
    if dtype == jnp.float32 and any(errors[n] > limits[n] for n in errors):
        scan = outputs_and_gradients(op, args, dtype, implementation="scan")
        limits = {n: max(limits[n], FLOAT32_VS_SCAN * error(scan[n], expected[n])) for n in expected}
    failed = [f"{n}: {errors[n]:.1e} > {limits[n]:.1e}" for n in errors if not errors[n] <= limits[n]]
    assert not failed, "; ".join(failed)


def check_vanishing_denominator(op: Callable, args: dict[str, Any], dtype: Any, limit: float) -> None:
    """Assert that the mLSTM's kernels hold for m above 89: e^-m is less than float32 holds, also in rows behind the
    end, whose n.q is 0. Elsewhere n.q stays away from 0.
    """
    args["i"], args["q"], args["k"] = args["i"] + 150, np.abs(args["q"]), np.abs(args["k"])
    found, expected = (outputs_and_gradients(op, args, dtype, implementation=name) for name in ("pallas", "scan"))
    assert all(np.isfinite(x).all() for x in found.values())
    for name in ("o", "dv"):
        assert error(found[name], expected[name]) < limit, name


def _limit(name: str, dtype: Any, correlated: bool) -> float:
    if dtype == jnp.float64:
        return FLOAT64
    if dtype == jnp.float32:
        return FLOAT32
    name = "state" if "state" in name else name.removeprefix("d")
    return max(BFLOAT16[name], BFLOAT16_CORRELATED) if correlated else BFLOAT16[name]


def _cotangent(x: jax.Array, seed: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(100 + seed).normal(size=x.shape), jnp.float32).astype(x.dtype)


def _named(name: str, state: Any) -> dict[str, Any]:
    parts = state if isinstance(state, tuple) else (state,)
    return {f"{name}{n}": x for n, x in enumerate(parts)}


def pairwise(fields: dict[str, list], allowed: Callable[[dict], bool] = lambda _: True) -> list[dict[str, Any]]:
    """Few points that hold every pair of values of any two fields together, where `allowed` lets them; always the same.

    Greedy (Cohen et al. 1997, "The AETG system"): each point starts from a pair that is still missing, and takes for
    every other field the value that adds most of the missing pairs.
    """
    missing = {
        frozenset({(a, x), (b, y)}): None  # a dict, for its order
        for a, b in itertools.combinations(fields, 2)
        for x in range(len(fields[a]))
        for y in range(len(fields[b]))
    }

    def value(point: dict[str, int]) -> dict[str, Any]:
        return {name: fields[name][i] for name, i in point.items()}

    points = []
    while missing:
        first = next(iter(missing))
        point, done = dict(sorted(first)), None
        for name in fields:
            if name in point:
                continue
            gains = [
                (sum(frozenset({(name, i), other}) in missing for other in point.items()), -i)
                for i in range(len(fields[name]))
                if allowed(value(point | {name: i}))
            ]
            if not gains:
                break
            point[name] = -max(gains)[1]
        else:
            done = {frozenset(pair) for pair in itertools.combinations(point.items(), 2)}
            points.append({name: value(point)[name] for name in fields})
        for pair in done or {first}:  # a pair that nothing can be added to is not allowed
            missing.pop(pair, None)
    return points


def variations(default: Case, **changes: list) -> list[Case]:
    """One case for each value of each field, everything else at the default."""
    return [default, *(replace(default, **{name: value}) for name, values in changes.items() for value in values)]
