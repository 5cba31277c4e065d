"""Gates per head on Hopper, around the kernels: as the vectors that those read, and their gradients, a kernel each way.

A thread has one chunk of one head, 64 tokens in registers. What is read and written is small, but XLA made a dozen
kernels of it, which took up to half as long as those of the recurrence.

The mLSTM's stabilizer m_t = max(log f_t + m_{t-1}, i_t), 0 before a new segment, is a map m -> max(a + m, l) of each
chunk: a first kernel finds a and l, and a thread of the second goes through those before its own. Its gates are
log f_t + m_{t-1} - m_t and i_t - m_t.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxlin.kernels import mosaic_gpu as gpu
from jaxlin.kernels.gated_linear_attention_gpu_fwd import ENTER, MIN_GATE, RUN, VALID, Form, present
from jaxlin.kernels.mosaic_gpu_registers import CHUNK
from jaxlin.kernels.tile_gpu_threads import THREADS, give, take, thread_numbers

LOG2_E = 1 / math.log(2)


class Gates(NamedTuple):
    """What there is of gates, [B, T, HV] float32; None for what there is not."""

    decay: Array | None = None  # log decay; [HV] where it is the same for all tokens
    write: Array | None = None  # log input gate
    m: Array | None = None  # the mLSTM's, before the first token: [B, HV]
    beta: Array | None = None  # the delta rule's weight

    def whole_chunks(self) -> Gates:
        """In float32, up to a multiple of 64 tokens with such as change nothing."""

        def whole(x, value=0.0):
            if x is None or x.ndim < 3:
                return x if x is None else x.astype(jnp.float32)
            fill = (0, 0), (0, -x.shape[1] % CHUNK), (0, 0)
            return jnp.pad(x.astype(jnp.float32), fill, constant_values=value)

        return Gates(whole(self.decay), whole(self.write, -jnp.inf), whole(self.m), whole(self.beta))


class Decays(NamedTuple):
    """Where a kernel's sums of a chunk have what log decays get: vectors [C] by number, channels behind the last."""

    rows: int
    columns: int
    writes: int
    channels: int
    count: int  # of the channels


def vectors(form: Form, gates: Gates, codes: Array | None, parts: int = 1) -> tuple[Array | None, Array | None]:
    """What the kernels read, [1|B * P, HV, 1|N / P, R, C] of P parts; the mLSTM's m at the ends of chunks [B, HV, N].

    b, b - w, log2 of the least denominator e^-m, beta; the first three in powers of two. Gates are of whole chunks, and
    0 where they are padding by `codes` [B, N, C].
    """
    if form.vectors == 0:
        return None, None
    if gates.decay is not None and gates.decay.ndim == 1:
        tokens = jnp.arange(1, CHUNK + 1, dtype=jnp.float32)
        return _base_two(gates.decay)[None, :, None, None, None] * tokens, None
    batch, time, heads = next(x.shape for x in gates if x is not None)
    chunks = time // CHUNK
    flat = {name: x.reshape(-1) for name, x in present(**gates._asdict(), codes=codes).items()}
    if form.denominator == "max":
        flat |= dict(zip(("sums", "least"), _stabilizers(flat, batch, chunks, heads), strict=True))

    def gate_vectors(index, inputs, outputs, _):
        given, at = dict(zip(flat, inputs, strict=True)), _Place.of(index[0], batch, chunks, heads)
        codes = at.codes(given)
        tokens = {name: at.tokens(given[name]) for name in ("decay", "write", "beta") if name in given}
        if form.denominator == "max":
            tokens, m = _stabilized(tokens, at.m(given), codes)
            give(outputs[1], at.of_head() * chunks + at.chunk, [m])
        tokens = {name: _masked(x, codes) for name, x in tokens.items()}
        made = []
        if form.gated:
            made.append(_running_sums([_base_two(x) for x in tokens["decay"]]))
        if form.write:
            made.append([b - _base_two(w) for b, w in zip(made[0], tokens["write"], strict=True)])
        if form.denominator == "max":
            made.append([-LOG2_E * m for m in tokens["m"]])
        if form.beta:
            made.append(tokens["beta"])
        give(outputs[0], at.in_parts(parts) * (form.vectors * CHUNK), list(itertools.chain(*made)))

    shapes = [(batch * parts, heads, chunks // parts, form.vectors, CHUNK)]
    shapes += [(batch, heads, chunks)] if form.denominator == "max" else []
    out = [jax.ShapeDtypeStruct((math.prod(shape),), jnp.float32) for shape in shapes]
    found = gpu.launch(gate_vectors, list(flat.values()), out, _grid(batch, chunks, heads))
    found = [x.reshape(shape) for x, shape in zip(found, shapes, strict=True)]
    return found[0], found[1] if len(found) > 1 else None


def gradients(
    sums: Array, parts: int, codes: Array | None, decays: Decays | None, others: tuple[int, ...] = ()
) -> list[Array]:
    """What gates [B, T, HV] get from what a kernel sums in a chunk, [several, B * P, HV, N / P, ...], of P parts.

    First log decays, if asked for: at each token the rows less the columns from it on, the writes before it, and all
    channels. Then, if any, the sum of the vectors `others`.
    """
    several, batch, heads, chunks, size = sums.shape
    block, batch, chunks = sums.size // several, batch // parts, chunks * parts
    flat = {name: x.reshape(-1) for name, x in present(sums=sums, codes=codes).items()}

    def gate_gradients(index, inputs, outputs, _):
        given, at = dict(zip(flat, inputs, strict=True)), _Place.of(index[0], batch, chunks, heads)
        own = at.in_parts(parts) * size

        def vector(number):
            found = (take(given["sums"], own + (w * block + number * CHUNK), CHUNK) for w in range(several))
            return [_sum(x) for x in zip(*found, strict=True)]

        made = []
        if decays is not None:
            through = [r - c for r, c in zip(vector(decays.rows), vector(decays.columns), strict=True)]
            later = _running_sums(through[::-1])[::-1]
            earlier = [None, *_running_sums(vector(decays.writes))[:-1]]
            channels = _sum([_sum(vector(decays.channels + n)) for n in range(decays.count // CHUNK)])
            made.append([_sum([channels, x] + ([] if y is None else [y])) for x, y in zip(later, earlier, strict=True)])
        if others:
            made.append([_sum(x) for x in zip(*map(vector, others), strict=True)])
        for x, ref in zip(made, outputs, strict=True):
            give(ref, at.token(), _masked(x, at.codes(given)), heads)

    shape = batch, chunks * CHUNK, heads
    out = [jax.ShapeDtypeStruct((math.prod(shape),), jnp.float32)] * ((decays is not None) + bool(others))
    found = gpu.launch(gate_gradients, list(flat.values()), out, _grid(batch, chunks, heads))
    return [x.reshape(shape) for x in found]


# ---- a thread's part ----


class _Place(NamedTuple):
    """The batch, chunk and head of each thread, [THREADS] int32 of each, and the numbers of chunks and heads."""

    batch: Array
    chunk: Array
    head: Array
    chunks: int
    heads: int

    @classmethod
    def of(cls, program: Array, batch: int, chunks: int, heads: int) -> _Place:
        """Threads next to each other have heads next to each other; those left over do what the last one does."""
        number = jnp.minimum(thread_numbers() + program * THREADS, batch * chunks * heads - 1)
        row = lax.div(number, jnp.int32(heads))
        return cls(
            lax.div(row, jnp.int32(chunks)), lax.rem(row, jnp.int32(chunks)), lax.rem(number, jnp.int32(heads)),
            chunks, heads,
        )  # fmt: skip

    def token(self) -> Array:
        """Where the chunk's first token is in [B, T, HV]; the next is HV further on."""
        return (self.batch * self.chunks + self.chunk) * (CHUNK * self.heads) + self.head

    def tokens(self, ref: gpu.Ref) -> list[Array]:
        """Those of the chunk, of an array [B, T, HV]."""
        return take(ref, self.token(), CHUNK, self.heads)

    def codes(self, given: dict) -> list[Array] | None:
        """The segment codes of the chunk's tokens, if there are any."""
        first = (self.batch * self.chunks + self.chunk) * CHUNK
        return take(given["codes"], first, CHUNK) if "codes" in given else None

    def in_parts(self, parts: int) -> Array:
        """Where the chunk is in [B * P, HV, N / P]."""
        each = self.chunks // parts
        row = self.batch * parts + lax.div(self.chunk, jnp.int32(each))
        return (row * self.heads + self.head) * each + lax.rem(self.chunk, jnp.int32(each))

    def of_head(self) -> Array:
        """Where the head is in [B, HV]."""
        return self.batch * self.heads + self.head

    def m(self, given: dict) -> Array:
        """The stabilizer before the chunk's first token, by way of all chunks before."""
        together = min(AT_ONCE, self.chunks)
        own = self.of_head() * _whole(self.chunks)

        def some(step, m):
            maps = (take(given[name], own + step * together, together) for name in ("sums", "least"))
            for n, (a, least) in enumerate(zip(*maps, strict=True)):
                m = jnp.where(step * together + n < self.chunk, jnp.maximum(a + m, least), m)
            return m

        (m,) = take(given["m"], self.of_head(), 1)
        return lax.fori_loop(jnp.int32(0), jnp.int32(_whole(self.chunks) // together), some, m)


# ---- the mLSTM's stabilizer ----

AT_ONCE = 32
"""Chunks whose maps a thread reads at once."""


def _whole(chunks: int) -> int:
    """Room for the maps of so many chunks."""
    together = min(AT_ONCE, chunks)
    return -(-chunks // together) * together


def _stabilizers(flat: dict[str, Array], batch: int, chunks: int, heads: int) -> list[Array]:
    """a and l of all chunks, [B * HV * `_whole`(N)] of each, from log f, i and segment codes."""
    flat = {name: flat[name] for name in ("decay", "write", "codes") if name in flat}

    def gate_stabilizers(index, inputs, outputs, _):
        given, at = dict(zip(flat, inputs, strict=True)), _Place.of(index[0], batch, chunks, heads)
        codes = at.codes(given)
        a = least = None
        for t, (log_f, i) in enumerate(zip(*(at.tokens(given[name]) for name in ("decay", "write")), strict=True)):
            decay = log_f
            if codes is not None:
                starts, valid = _starts(codes, t), _valid(codes[t])
                decay = jnp.where(starts, -jnp.inf, jnp.where(valid, log_f, 0.0))
                i = jnp.where(starts, jnp.maximum(log_f, i), jnp.where(valid, i, -jnp.inf))
            a, least = (decay, i) if a is None else (a + decay, jnp.maximum(least + decay, i))
        for ref, x in zip(outputs, (a, least), strict=True):
            give(ref, at.of_head() * _whole(chunks) + at.chunk, [x])

    out = [jax.ShapeDtypeStruct((batch * heads * _whole(chunks),), jnp.float32)] * 2
    return gpu.launch(gate_stabilizers, list(flat.values()), out, _grid(batch, chunks, heads))


def _stabilized(tokens: dict[str, list[Array]], m: Array, codes: list[Array] | None) -> tuple[dict, Array]:
    """log f, i and m of a chunk's tokens, in units of m; and the last m."""
    found: dict[str, list[Array]] = dict(decay=[], write=[], m=[])
    for t, (log_f, i) in enumerate(zip(tokens["decay"], tokens["write"], strict=True)):
        before = m if codes is None else jnp.where(_starts(codes, t), 0.0, m)
        new = jnp.maximum(log_f + before, i)
        m = new if codes is None else jnp.where(_valid(codes[t]), new, m)
        for name, x in dict(decay=log_f + before - m, write=i - m, m=m).items():
            found[name].append(x)
    return found, m


def _starts(codes: list[Array], t: int) -> Array:
    """Whether a chunk's token t begins a new segment."""
    if t == 0:
        return lax.bitwise_and(codes[0], ENTER) == 0
    return lax.bitwise_xor(codes[t], codes[t - 1]) >= RUN


# ---- numbers ----


def _valid(code: Array) -> Array:
    return lax.bitwise_and(code, VALID) != 0


def _masked(tokens: list[Array], codes: list[Array] | None) -> list[Array]:
    """Zero in padding."""
    if codes is None:
        return tokens
    return [jnp.where(_valid(code), x, 0.0) for code, x in zip(codes, tokens, strict=True)]


def _grid(batch: int, chunks: int, heads: int) -> tuple[int]:
    return (-(-batch * chunks * heads // THREADS),)


def _base_two(gate: Array) -> Array:
    """A log gate in powers of two."""
    return LOG2_E * jnp.maximum(gate, MIN_GATE)


def _running_sums(x: list[Array], size: int = 8) -> list[Array]:
    """The sums of all up to each: of blocks, then of those before, so that few roundings follow each other."""
    blocks = [list(itertools.accumulate(x[at : at + size])) for at in range(0, len(x), size)]
    before = itertools.accumulate(block[-1] for block in blocks[:-1])
    return blocks[0] + [b + y for b, block in zip(before, blocks[1:], strict=True) for y in block]


def _sum(x) -> Array:
    """All added up, by halves: as few roundings as can follow each other."""
    x = list(x)
    return x[0] if len(x) == 1 else _sum(x[: len(x) // 2]) + _sum(x[len(x) // 2 :])
