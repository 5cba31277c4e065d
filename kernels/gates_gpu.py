"""Gates per head on Hopper, around the kernels: as the vectors that those read, and their gradients, a kernel each way.

A chunk of a head belongs to four threads, 16 tokens in the registers of each. What is read and written is small, but
XLA made a dozen kernels of it, which took up to half as long as those of the recurrence.

The mLSTM's stabilizer m_t = max(log f_t + m_{t-1}, i_t), 0 before a new segment, is a map m -> max(a + m, l) over any
stretch of tokens: a first kernel finds a and l of all chunks, and a thread of the second goes through those before its
own. Its gates are log f_t + m_{t-1} - m_t and i_t - m_t.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxlin.kernels import mosaic_gpu as gpu
from jaxlin.kernels.gated_linear_attention import LEAST_LOG_DENOMINATOR
from jaxlin.kernels.gated_linear_attention_gpu_fwd import ENTER, MIN_GATE, RUN, VALID, Form, present
from jaxlin.kernels.mosaic_gpu_registers import CHUNK
from jaxlin.kernels.tile_gpu_threads import THREADS, give, take, thread_numbers

LOG2_E = 1 / math.log(2)
SHARE = 4
"""Threads that have a chunk of a head."""
TOKENS = CHUNK // SHARE
"""A thread's."""
AT_ONCE = 32
"""Chunks whose maps a thread reads at once."""
EXCHANGES = 3
"""Numbers of a thread that the others of its chunk may ask for."""


class Gates(NamedTuple):
    """What there is of gates, [B, T, HV] float32 where nothing else is said; None for what there is not."""

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
    """Which of the vectors that a kernel sums in a chunk are for log decays."""

    rows: int
    columns: int
    writes: int


def vectors(form: Form, gates: Gates, codes: Array | None, parts: int = 1) -> tuple[Array | None, Array | None]:
    """What the kernels read, [1|B * P, HV, 1|N / P, R, C] of P parts; and the mLSTM's final m [B, HV].

    b, c = b - w, log2 of the least denominator e^-m, beta; the first three in powers of two. Gates are of whole chunks,
    and 0 where they are padding by `codes` [B, N, C].
    """
    if form.vectors == 0:
        return None, None
    if gates.decay is not None and gates.decay.ndim == 1:
        tokens = jnp.arange(1, CHUNK + 1, dtype=jnp.float32)
        return _base_two(gates.decay)[None, :, None, None, None] * tokens, None
    batch, time, heads = next(x.shape for x in gates if x is not None)
    chunks, stabilized = time // CHUNK, form.denominator == "max"
    size = batch, chunks, heads
    given = present(**gates._asdict(), codes=codes)
    if stabilized:
        given |= dict(zip(("a", "least"), _maps_of_chunks(given, size), strict=True))

    def gate_vectors(at: _Thread, out: list[gpu.Ref]) -> None:
        tokens = {name: at.tokens(name) for name in ("decay", "write", "beta") if name in given}
        code = at.codes()
        if stabilized:
            starts = at.starts(code)
            tokens, m = _stabilized(tokens, at.m_before(_map(tokens, starts, code)), starts, code)
            give(out[1], at.chunk_of_head() * SHARE + at.part, [m])
        tokens = {name: _masked(x, code) for name, x in tokens.items()}
        made = []
        if form.gated:
            made.append(at.running_sums([_base_two(x) for x in tokens["decay"]]))
        if form.write:
            made.append([b - _base_two(w) for b, w in zip(made[0], tokens["write"], strict=True)])
        if stabilized:
            made.append([LOG2_E * jnp.maximum(-m, LEAST_LOG_DENOMINATOR) for m in tokens["m"]])
        if form.beta:
            made.append(tokens["beta"])
        for r, x in enumerate(made):
            give(out[0], at.vector(parts, form.vectors, r), x)

    shapes = [(batch * parts, heads, chunks // parts, form.vectors, CHUNK)]
    shapes += [(batch, heads, chunks * SHARE)] if stabilized else []
    found = _launch(gate_vectors, given, shapes, size)
    return found[0], found[1][..., -1] if stabilized else None


def gradients(
    sums: Array, parts: int, codes: Array | None, decays: Decays | None, others: tuple[int, ...] = ()
) -> list[Array]:
    """What gates [B, T, HV] get from what a kernel sums in a chunk, [several, B * P, HV, N / P, R * C], of P parts.

    First log decays, if asked for: at each token the rows less the columns from it on, and the writes before it. Then,
    if any are named, the sum of the vectors `others`.
    """
    several, batch, heads, chunks, width = sums.shape
    size, block = (batch // parts, chunks * parts, heads), sums.size // several

    def gate_gradients(at: _Thread, out: list[gpu.Ref]) -> None:
        def vector(number):
            first = at.vector(parts, width // CHUNK, number)
            return _each_sum(take(at.given["sums"], first + w * block, TOKENS) for w in range(several))

        made = []
        if decays is not None:
            through = [r - c for r, c in zip(vector(decays.rows), vector(decays.columns), strict=True)]
            later, earlier = at.running_sums(through, onward=True), at.sums_before(vector(decays.writes))
            made.append(_each_sum((later, earlier)))
        if others:
            made.append(_each_sum(map(vector, others)))
        codes = at.codes()
        for x, ref in zip(made, out, strict=True):
            give(ref, at.token(), _masked(x, codes), heads)

    shapes = [(batch // parts, size[1] * CHUNK, heads)] * ((decays is not None) + bool(others))
    return _launch(gate_gradients, present(sums=sums, codes=codes), shapes, size)


# ---- the mLSTM's stabilizer ----


def _maps_of_chunks(given: dict[str, Array], size: tuple[int, int, int]) -> list[Array]:
    """a and l of all chunks, [B, HV, `_room`(N)] of each, from log f, i and segment codes."""
    batch, chunks, heads = size

    def gate_maps(at: _Thread, out: list[gpu.Ref]) -> None:
        codes = at.codes()
        tokens = {name: at.tokens(name) for name in ("decay", "write")}
        of_threads = at.of_all(*_map(tokens, at.starts(codes), codes))
        for ref, x in zip(out, functools.reduce(_then, zip(*of_threads, strict=True)), strict=True):
            give(ref, at.head_of_all() * _room(chunks) + at.chunk, [x])

    given = {name: given[name] for name in ("decay", "write", "codes") if name in given}
    return _launch(gate_maps, given, [(batch, heads, _room(chunks))] * 2, size)


def _room(chunks: int) -> int:
    """For the maps of so many chunks, read several at once."""
    together = min(AT_ONCE, chunks)
    return -(-chunks // together) * together


def _map(tokens: dict[str, list[Array]], starts: list[Array], codes: list[Array] | None) -> tuple[Array, Array]:
    """a and l of a thread's tokens."""
    maps = list(zip(tokens["decay"], tokens["write"], strict=True))
    for t, (log_f, i) in enumerate(maps):
        if codes is not None:
            valid = _valid(codes[t])
            a = jnp.where(starts[t], -jnp.inf, jnp.where(valid, log_f, 0.0))
            maps[t] = a, jnp.where(starts[t], jnp.maximum(log_f, i), jnp.where(valid, i, -jnp.inf))
    return functools.reduce(_then, maps)


def _then(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[Array, Array]:
    """a and l of one stretch of tokens and of the next, as one."""
    a, least = second
    return first[0] + a, jnp.maximum(first[1] + a, least)


def _stabilized(
    tokens: dict[str, list[Array]], m: Array, starts: list[Array], codes: list[Array] | None
) -> tuple[dict[str, list[Array]], Array]:
    """log f and i of a thread's tokens in units of m, and m; and the last m."""
    found: dict[str, list[Array]] = dict(decay=[], write=[], m=[])
    for t, (log_f, i) in enumerate(zip(tokens["decay"], tokens["write"], strict=True)):
        before = m if codes is None else jnp.where(starts[t], 0.0, m)
        new = jnp.maximum(log_f + before, i)
        m = new if codes is None else jnp.where(_valid(codes[t]), new, m)
        for name, x in dict(decay=log_f + before - m, write=i - m, m=m).items():
            found[name].append(x)
    return found, m


# ---- a thread ----


class _Thread:
    """A thread's batch, chunk, head and part of the chunk: [THREADS] of each, as all numbers here are.

    Those of a chunk lie side by side, then those of the next head. Threads left over do what the last chunk's do.
    """

    def __init__(self, program: Array, given: dict[str, gpu.Ref], exchange: gpu.Ref, size: tuple[int, int, int]):
        batch, self.chunks, self.heads = size
        self.given, self._exchange, self._exchanged = given, exchange, 0
        number, self.part = (f(thread_numbers(), jnp.int32(SHARE)) for f in (lax.div, lax.rem))
        number = jnp.minimum(program * (THREADS // SHARE) + number, batch * self.chunks * self.heads - 1)
        row, self.head = (f(number, jnp.int32(self.heads)) for f in (lax.div, lax.rem))
        self.batch, self.chunk = (f(row, jnp.int32(self.chunks)) for f in (lax.div, lax.rem))

    def _row(self) -> Array:
        """Where the first token is in [B, T]."""
        return (self.batch * self.chunks + self.chunk) * CHUNK + self.part * TOKENS

    def token(self) -> Array:
        """Where the first token is in [B, T, HV]; the next is HV further on."""
        return self._row() * self.heads + self.head

    def head_of_all(self) -> Array:
        """Where the head is in [B, HV]."""
        return self.batch * self.heads + self.head

    def chunk_of_head(self) -> Array:
        """Where the chunk is in [B, HV, N]."""
        return self.head_of_all() * self.chunks + self.chunk

    def vector(self, parts: int, vectors: int, number: int) -> Array:
        """Where the first token is in [B * P, HV, N / P, R, C], of vector `number` of R."""
        each = jnp.int32(self.chunks // parts)
        row = self.batch * parts + lax.div(self.chunk, each)
        chunk = (row * self.heads + self.head) * each + lax.rem(self.chunk, each)
        return (chunk * vectors + number) * CHUNK + self.part * TOKENS

    def tokens(self, name: str) -> list[Array]:
        """Those of an array [B, T, HV]."""
        return take(self.given[name], self.token(), TOKENS, self.heads)

    def codes(self) -> list[Array] | None:
        """The tokens' segment codes, if there are any."""
        return take(self.given["codes"], self._row(), TOKENS) if "codes" in self.given else None

    def starts(self, codes: list[Array] | None) -> list[Array]:
        """Whether each token begins a new segment; nothing without segments."""
        if codes is None:
            return []
        (before,) = take(self.given["codes"], jnp.maximum(self._row() - 1, 0), 1)
        starts = [lax.bitwise_xor(x, y) >= RUN for x, y in itertools.pairwise((before, *codes))]
        first = jnp.where(self.part == 0, lax.bitwise_and(codes[0], ENTER) == 0, starts[0])
        return [first, *starts[1:]]

    def of_all(self, *own: Array) -> list[list[Array]]:
        """Each number as the chunk's threads have it, in the order of their tokens."""
        places = [(self._exchanged + n) * THREADS for n in range(len(own))]
        self._exchanged += len(own)
        assert self._exchanged <= EXCHANGES  # each has a place of its own, so that one barrier does
        for place, x in zip(places, own, strict=True):
            give(self._exchange, thread_numbers() + place, [x])
        gpu.commit()
        return [take(self._exchange, thread_numbers() - self.part + place, SHARE) for place in places]

    def running_sums(self, x: list[Array], onward: bool = False) -> list[Array]:
        """At each token the sum of the chunk's up to it, or from it on."""
        sums = _running_sums(x[::-1])[::-1] if onward else _running_sums(x)
        others = self._others(sums[0 if onward else -1], lambda n: self.part < n if onward else self.part > n)
        return [y + others for y in sums]

    def sums_before(self, x: list[Array]) -> list[Array]:
        """At each token the sum of the chunk's before it."""
        *sums, total = _running_sums(x)
        others = self._others(total, lambda n: self.part > n)
        return [others, *(y + others for y in sums)]

    def _others(self, total: Array, which: Callable[[int], Array]) -> Array:
        """The sum of the totals that those of the chunk's threads have which are asked for."""
        (totals,) = self.of_all(total)
        return _sum([jnp.where(which(n), x, 0.0) for n, x in enumerate(totals)])

    def m_before(self, own: tuple[Array, Array]) -> Array:
        """The stabilizer before the first token, by way of all chunks before and the maps of the chunk's threads."""
        together, room = min(AT_ONCE, self.chunks), _room(self.chunks)
        first = self.head_of_all() * room

        def some(step, m):
            maps = (take(self.given[name], first + step * together, together) for name in ("a", "least"))
            for n, (a, least) in enumerate(zip(*maps, strict=True)):
                m = jnp.where(step * together + n < self.chunk, jnp.maximum(a + m, least), m)
            return m

        (m,) = take(self.given["m"], self.head_of_all(), 1)
        m = lax.fori_loop(jnp.int32(0), jnp.int32(room // together), some, m)
        for n, (a, least) in enumerate(zip(*self.of_all(*own), strict=True)):
            m = jnp.where(self.part > n, jnp.maximum(a + m, least), m)
        return m


def _launch(body: Callable, given: dict[str, Array], shapes: list[tuple], size: tuple[int, int, int]) -> list[Array]:
    """Float32 arrays of these shapes, made by body(thread, flat outputs) for all of (B, N, HV)."""

    def run(index, inputs, outputs, buffers):
        body(_Thread(index[0], dict(zip(given, inputs, strict=True)), buffers[0], size), outputs)

    run.__name__ = body.__name__
    out = [jax.ShapeDtypeStruct((math.prod(shape),), jnp.float32) for shape in shapes]
    flat, exchange = [x.reshape(-1) for x in given.values()], gpu.vector(EXCHANGES * THREADS)
    found = gpu.launch(run, flat, out, (-(-math.prod(size) * SHARE // THREADS),), [exchange])
    return [x.reshape(shape) for x, shape in zip(found, shapes, strict=True)]


# ---- numbers ----


def _base_two(gate: Array) -> Array:
    """A log gate in powers of two."""
    return LOG2_E * jnp.maximum(gate, MIN_GATE)


def _valid(code: Array) -> Array:
    return lax.bitwise_and(code, VALID) != 0


def _masked(tokens: list[Array], codes: list[Array] | None) -> list[Array]:
    """Zero in padding."""
    if codes is None:
        return tokens
    return [jnp.where(_valid(code), x, 0.0) for code, x in zip(codes, tokens, strict=True)]


def _running_sums(x: list[Array], size: int = 4) -> list[Array]:
    """The sums of all up to each: of blocks, then of those before, so that few roundings follow each other."""
    blocks = [list(itertools.accumulate(x[at : at + size])) for at in range(0, len(x), size)]
    before = itertools.accumulate(block[-1] for block in blocks[:-1])
    return blocks[0] + [b + y for b, block in zip(before, blocks[1:], strict=True) for y in block]


def _each_sum(several: Iterable[list[Array]]) -> list[Array]:
    """The sums of the first of all lists, of the second, ..."""
    return [_sum(x) for x in zip(*several, strict=True)]


def _sum(x: Iterable[Array]) -> Array:
    """All added up, by halves: as few roundings as can follow each other."""
    x = list(x)
    return x[0] if len(x) == 1 else _sum(x[: len(x) // 2]) + _sum(x[len(x) // 2 :])
