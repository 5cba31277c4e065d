"""The peers that `bench` times, in PyTorch: flash-linear-attention (`fla`) and `mlstm_kernels`, where installed.

Arrays come from JAX on the CPU (`bench` starts these processes so): two CUDA runtimes in one process invite trouble.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

FLA = {
    "linear_attention": ("linear_attn", "chunk_linear_attn", "q k v"),
    "retention": ("retention", "chunk_retention", "q k v"),
    "gla": ("gla", "chunk_gla", "q k v g"),
    "deltanet": ("delta_rule", "chunk_delta_rule", "q k v beta"),
    "gated_deltanet": ("gated_delta_rule", "chunk_gated_delta_rule", "q k v g beta"),
    "kda": ("kda", "chunk_kda", "q k v g beta"),
}
"""Module in fla.ops, its function, our names of its arguments, in order (retention's gates are built in)."""


def fla(op: str) -> tuple[Callable, tuple[str, ...]]:
    """(function, names of its arguments) of flash-linear-attention."""
    module, name, order = FLA[op]
    function = getattr(importlib.import_module(f"fla.ops.{module}"), name)
    options = dict(normalize=False) if op == "linear_attention" else {}
    return lambda *args: function(*args, **options)[0], tuple(order.split())


def mlstm_kernels(op: str) -> tuple[Callable, tuple[str, ...]]:
    """The same of mlstm_kernels, whose arrays have heads before time."""
    module = importlib.import_module("mlstm_kernels.torch.chunkwise.triton_xl_chunk")
    names = ("q", "k", "v", "i", "f")
    return lambda *args: module.mlstm_chunkwise__xl_chunk(**dict(zip(names, args, strict=True))), names


PEERS = {"fla": fla, "mlstm_kernels": mlstm_kernels}
HEADS_FIRST = {"mlstm_kernels"}
"""Timed in their own layout; nothing is transposed while the clock runs."""


@functools.cache  # once in a process
def compile_side_by_side() -> None:
    """Have Triton compile all candidates of a kernel in threads before it times the first: some peers have hundreds.

    What it tunes, and how, stays its own business; so do candidates that do not compile.
    """
    tuner = importlib.import_module("triton.runtime.autotuner").Autotuner
    mode = importlib.import_module("triton.runtime._async_compile").AsyncCompileMode
    time_one = tuner._bench

    def compile_then_time(self: Any, *args: Any, config: Any, **meta: Any) -> Any:
        candidates = self.prune_configs(meta)
        if config is candidates[0]:
            options = {name: value for name, value in meta.items() if name != "warmup"}
            with (
                contextlib.suppress(Exception),
                ThreadPoolExecutor(os.cpu_count()) as pool,
                mode(pool, ignore_errors=True),
            ):
                for candidate in candidates:
                    self.fn.warmup(*args, **options, **candidate.all_kwargs())
        return time_one(self, *args, config=config, **meta)

    tuner._bench = compile_then_time


class TorchCalls:
    """The passes of a peer over given arguments, each tried by itself."""

    def __init__(self, op: str, implementation: str, args: dict[str, Array], cotangent: Array):
        self.torch = importlib.import_module("torch")
        self.device = "cuda" if self.torch.cuda.is_available() else "cpu"
        if self.device == "cuda":
            compile_side_by_side()
        self.heads_first = implementation in HEADS_FIRST
        self.function, self.names = PEERS[implementation](op)
        self.args = [self.tensor(args[name]).requires_grad_() for name in self.names]
        self.cotangent = self.tensor(cotangent)
        self.block = None

    def tensor(self, x: Array) -> Any:
        """A JAX array as the peer wants it."""
        dtype = self.torch.bfloat16 if x.dtype == jnp.bfloat16 else self.torch.float32
        y = self.torch.from_numpy(np.array(x.astype(jnp.float32))).to(self.device).to(dtype)
        return y.transpose(1, 2).contiguous() if self.heads_first else y

    def array(self, x: Any) -> np.ndarray:
        """Our layout again, float32."""
        return (x.transpose(1, 2) if self.heads_first else x).detach().float().cpu().numpy()

    def outputs(self, name: str, cotangent: Any) -> dict[str, Any]:
        """o, and from both passes the gradients, by name."""
        if name == "forward":
            with self.torch.no_grad():
                return dict(o=self.function(*self.args))
        o = self.function(*self.args)
        found = self.torch.autograd.grad(o, self.args, cotangent.to(o.dtype))
        return dict(o=o) | {f"d{n}": x for n, x in zip(self.names, found, strict=True)}

    def prepare(self, name: str) -> None:
        """Triton compiles and tunes; with others on the device, which hardly moves the medians that tuning goes by."""
        for _ in range(2):
            self.outputs(name, self.cotangent)
        self.wait()
        self.free()

    def check(self, name: str, cotangent: Array) -> dict[str, np.ndarray]:
        """What the first sequence gets of a pass."""
        found = self.outputs(name, self.tensor(cotangent))
        return {n: self.array(x[:1]) for n, x in found.items()}

    def call(self, name: str) -> Any:
        return self.outputs(name, self.cotangent)

    def wait(self, _: Any = None) -> None:
        if self.device == "cuda":
            self.torch.cuda.synchronize()

    def free(self) -> None:
        """Others are made ready on the same device."""
        if self.device == "cuda":
            self.torch.cuda.empty_cache()

    def blocker(self) -> Any:
        """Keep the device busy with adding to 1 GiB."""
        if self.block is None:
            self.block = self.torch.zeros(1 << 28, dtype=self.torch.int32, device=self.device)
        return self.block.add_(1)
