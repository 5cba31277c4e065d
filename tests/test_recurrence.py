"""The definitions against two independent statements: a numpy loop, and the parallel form of the papers."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlin import recurrence
from tests import grid
from tests.grid import Case

OPS = ("gated_linear_attention", "gated_delta_rule", "mlstm")
CASE = Case(T=11, H=2, HV=4, K=5, V=3, segments="gaps", strength="mild")


def define(op: str, args: dict):
    """o and the final state by the definition, in float64."""
    with jax.enable_x64(True):
        options = {n: args[n] for n in args if n == "normalize"}
        arrays = {n: jax.tree.map(jnp.asarray, args[n]) for n in args if n not in options}
        return jax.tree.map(np.asarray, jax.jit(functools.partial(getattr(recurrence, op), **options))(**arrays))


def loop(op: str, args: dict) -> tuple[np.ndarray, list[np.ndarray]]:
    """The same by plain loops over rows, heads and tokens."""
    q, k, v, segments = (args[n] for n in ("q", "k", "v", "segment_ids"))
    normalize = args.get("normalize", False)
    state = args["initial_state"]
    state = [np.array(x) for x in (state if isinstance(state, tuple) else (state,))]
    o = np.zeros_like(v)
    group = v.shape[2] // k.shape[2]
    for b, h in np.ndindex(v.shape[0], v.shape[2]):
        last = 0
        for t in range(v.shape[1]):
            segment = 1 if segments is None else segments[b, t]
            if segment == 0:
                continue
            if last not in (0, segment):
                for part in state:
                    part[b, h] = 0
            last = segment
            qt, kt, vt = q[b, t, h // group] / np.sqrt(k.shape[-1]), k[b, t, h // group], v[b, t, h]
            g = args.get("g")
            decay = np.exp(0.0 if g is None else g[h] if g.ndim == 1 else g[b, t, h])
            s = state[0][b, h]
            if op == "mlstm":
                log_f = -np.log1p(np.exp(-args["f"][b, t, h]))
                m = max(log_f + state[2][b, h], args["i"][b, t, h])
                forget, write = np.exp(log_f + state[2][b, h] - m), np.exp(args["i"][b, t, h] - m)
                state[0][b, h] = forget * s + write * np.outer(kt, vt)
                state[1][b, h] = forget * state[1][b, h] + write * kt
                state[2][b, h] = m
                o[b, t, h] = qt @ state[0][b, h] / max(abs(qt @ state[1][b, h]), np.exp(-m))
                continue
            s = decay[:, None] * s if np.ndim(decay) else decay * s
            if op == "gated_delta_rule":
                vt = args["beta"][b, t, h] * (vt - kt @ s)
            state[0][b, h] = s + np.outer(kt, vt)
            o[b, t, h] = qt @ state[0][b, h]
            if normalize:
                state[1][b, h] = decay * state[1][b, h] + kt
                o[b, t, h] /= qt @ state[1][b, h] + 1e-10
    return o, state


@pytest.mark.parametrize("op,gate", [*itertools.product(OPS[:2], ("none", "scalar", "channel")), ("mlstm", "own")])
def test_loop(op, gate):
    for normalize in (False, True) if op == "gated_linear_attention" else (False,):
        for segments in ("gaps", "none"):
            args = grid.inputs(op, replace(CASE, gate=gate, segments=segments), normalize)
            o, state = define(op, args)
            expected, final = loop(op, args)
            np.testing.assert_allclose(o, expected, rtol=1e-10, atol=1e-12)
            for found, part in zip(jax.tree.leaves(state), final, strict=True):
                np.testing.assert_allclose(found, part, rtol=1e-10, atol=1e-12)


def test_constant_gate_is_that_gate_at_every_token():
    args = grid.inputs("gated_linear_attention", replace(CASE, gate="constant"))
    constant, _ = define("gated_linear_attention", args)
    args["g"] = np.broadcast_to(args["g"], (*args["v"].shape[:3],))
    np.testing.assert_array_equal(constant, define("gated_linear_attention", args)[0])


def parallel(op: str, args: dict) -> np.ndarray:
    """The O(T^2) forms, for one head and a zero state, from the equations of the papers."""
    q, k, v = (args[n][0, :, 0] for n in ("q", "k", "v"))
    q = q / np.sqrt(k.shape[-1])
    causal = np.tril(np.ones((len(q), len(q))))
    if op == "mlstm":  # Beck et al. 2024, appendix A.3: S = QK^T exp(D~ - m), H = S V / max(|sum S|, e^-m)
        f = np.cumsum(-np.log1p(np.exp(-args["f"][0, :, 0])))
        d = np.where(causal > 0, f[:, None] - f[None] + args["i"][0, :, 0][None], -np.inf)
        m = np.maximum(d.max(1), f)  # f: the zero state has m = 0
        s = q @ k.T * np.exp(d - m[:, None])
        return s @ v / np.maximum(np.abs(s.sum(1)), np.exp(-m))[:, None]
    b = np.cumsum(args["g"][0, :, 0], 0)
    b = b[:, None] if b.ndim == 1 else b
    decay = np.exp(b[:, None] - b[None]) * causal[..., None]
    scores = np.einsum("ik,jk,ijk->ij", q, k, np.broadcast_to(decay, (*causal.shape, k.shape[-1])))
    if op == "gated_linear_attention":  # Yang et al. 2024 (GLA), section 4.2: O = (((Q . B) (K / B)^T) . M) V
        return scores @ v
    # Yang et al. 2025 (gated delta networks), section 3.2: U = (I + tril(diag(beta) (G . K K^T), -1))^-1 diag(beta) V
    beta = args["beta"][0, :, 0]
    keys = np.einsum("ik,jk,ijk->ij", k, k, np.broadcast_to(decay, (*causal.shape, k.shape[-1])))
    u = np.linalg.solve(np.eye(len(q)) + beta[:, None] * np.tril(keys, -1), beta[:, None] * v)
    return scores @ u


@pytest.mark.parametrize("op,gate", [(OPS[0], "scalar"), (OPS[0], "channel"), (OPS[1], "channel"), (OPS[2], "scalar")])
def test_parallel_form(op, gate):
    args = grid.inputs(op, Case(B=1, T=23, K=6, V=4, gate=gate, strength="mild"))
    args["initial_state"] = jax.tree.map(np.zeros_like, args["initial_state"])
    np.testing.assert_allclose(define(op, args)[0][0, :, 0], parallel(op, args), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("op", OPS)
def test_steps_make_the_scan(op):
    args = grid.inputs(op, replace(CASE, segments="none"))
    o, final = define(op, args)
    step = jax.jit(getattr(recurrence, f"{op}_step"))
    with jax.enable_x64(True):
        state = jax.tree.map(jnp.asarray, args["initial_state"])
        names = {"gated_linear_attention": "qkvg", "gated_delta_rule": ("q", "k", "v", "beta", "g"), "mlstm": "qkvif"}
        for t in range(CASE.T):
            o_t, state = step(*(jnp.asarray(args[n][:, t]) for n in names[op]), state)
            np.testing.assert_allclose(o_t, o[:, t], rtol=1e-12, atol=1e-13)
    for found, expected in zip(jax.tree.leaves(state), jax.tree.leaves(final), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("op", OPS)
def test_causal_and_packed(op):
    """No gradient from a later token, from another segment, or to padding."""
    args = grid.inputs(op, Case(B=1, T=8, H=1, K=4, V=4, strength="mild"))
    ids = np.array([[0, 1, 1, 0, 1, 2, 2, 0]])
    function = getattr(recurrence, op)
    state = jax.tree.map(jnp.asarray, args.pop("initial_state"))
    rest = {n: jnp.asarray(x) for n, x in args.items() if n not in ("v", "segment_ids")}

    def o(v):
        return function(v=v, initial_state=state, segment_ids=jnp.asarray(ids), **rest)[0][0, :, 0].sum(-1)

    depends = np.abs(jax.jacobian(o)(jnp.asarray(args["v"]))[:, 0, :, 0]).sum(-1) > 0
    t = np.arange(8)
    expected = (t[:, None] >= t) & (ids[0][:, None] == ids[0]) & (ids[0] > 0)
    np.testing.assert_array_equal(depends, expected)
