"""What the token mixers share: projections, rotary embedding, short convolution, output norm and gate."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float, Int

from jaxlin.config import MixerOptions, ModelConfig, UserError
from jaxlin.mixers.layer_state import LayerState
from jaxlin.mixers.rounding import silu
from jaxlin.mixers.short_conv import previous_valid, short_conv

State = dict[str, Any]
ResolvedOptions = Any  # MixerOptions, with no None left in what the mixer reads; its types still allow None
SILU_NEUTRAL_BIAS = 1.27846454  # silu of it is 1, to 1e-8


def precision(dtype: str) -> lax.Precision:
    """Float32 means float32: accelerators would otherwise round the operands."""
    return lax.Precision.DEFAULT if dtype == "bfloat16" else lax.Precision.HIGHEST


def gate_dtype(config: ModelConfig) -> str:
    """Gates are computed in float32 at least."""
    return "float64" if config.dtype == "float64" else "float32"


def partitioned(init: Any, axes: tuple[str | None, ...]) -> Any:
    """The initialiser `init` with logical axes. A parameter comes out of its box, which flax's types do not know."""
    return nn.with_logical_partitioning(init, axes)


class Dense(nn.Module):
    """A linear map of the last `inputs` axes to `features`, with HF's names and logical sharding axes."""

    config: ModelConfig
    features: tuple[int, ...]
    axes: tuple[str | None, ...]
    use_bias: bool = False
    inputs: int = 1
    dtype: str | None = None
    kernel_init: Any = nn.initializers.lecun_normal()
    bias_init: Any = nn.initializers.zeros
    wide: bool = False
    """Give float32 at least, to which the bias is added unrounded, whatever the product's dtype."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        dtype = self.dtype or self.config.dtype
        # An input that was rounded to bfloat16 needs no exact product: TF32 and three passes of bfloat16 lose less.
        rounded = x.dtype == jnp.bfloat16 and dtype != "bfloat16"
        dense = nn.DenseGeneral(
            self.features,
            axis=tuple(range(-self.inputs, 0)),
            use_bias=False,
            dtype=dtype,
            precision=lax.Precision.HIGH if rounded else precision(dtype),
            kernel_init=partitioned(self.kernel_init, self.axes),
        )
        nn.share_scope(self, dense)  # its parameters are this module's, as in HF's names
        y = dense(x)
        if self.wide:
            y = y.astype(jnp.promote_types(y.dtype, jnp.float32))
        if self.use_bias:
            init = partitioned(self.bias_init, self.axes[self.inputs :])
            y += self.param("bias", init, self.features, jnp.float32).astype(y.dtype)
        return y


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, in float32 (Zhang & Sennrich 2019, arXiv 1910.07467).

    `shape` and `axes` of the weight default to one value for each entry of the last axis.
    """

    config: ModelConfig
    shape: tuple[int, ...] | None = None
    axes: tuple[str | None, ...] = (None,)

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = partitioned(nn.initializers.ones, self.axes)
        weight = self.param("weight", init, self.shape or x.shape[-1:])
        return (rms_normalize(x, self.config.rms_norm_eps) * weight).astype(x.dtype)


def rms_normalize(x: Array, eps: float) -> Array:
    """x / rms(x) over the last axis, in float32."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


def l2_normalize(x: Array) -> Array:
    """x / |x| over the last axis; the delta rules need unit keys (with larger ones their state explodes)."""
    y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (y * lax.rsqrt(jnp.sum(y * y, axis=-1, keepdims=True) + 1e-6)).astype(x.dtype)


def positions_in_segments(
    shape: tuple[int, ...], segment_ids: Int[Array, "B T"] | None, start: Int[Array, " B"] | None
) -> tuple[Int[Array, "B T"], Int[Array, " B"]]:
    """Each token's rank in its segment, and the next position after the row's last token.

    Padding (id 0) is not counted and never ends a segment. The row's first segment continues at `start`.
    """
    batch, length = shape
    start = jnp.zeros(batch, jnp.int32) if start is None else start
    if segment_ids is None:
        positions = start[:, None] + jnp.arange(length, dtype=jnp.int32)
        return positions, start + length
    valid = segment_ids != 0
    count = jnp.cumsum(valid, axis=1, dtype=jnp.int32)
    first = first_of_segment(segment_ids)
    # Tokens before the current segment's first one; the first segment begins `start` tokens before the call.
    offset = lax.cummax(jnp.where(first, count - 1, 0), axis=1)
    in_first = jnp.cumsum(first, axis=1) <= 1
    positions = jnp.maximum(count - 1 - offset + jnp.where(in_first, start[:, None], 0), 0)
    last = jnp.maximum(jnp.max(jnp.where(valid, jnp.arange(length), -1), axis=1), 0)
    after = jnp.take_along_axis(positions, last[:, None], axis=1)[:, 0] + 1
    return positions, jnp.where(jnp.any(valid, axis=1), after, start)


def first_of_segment(segment_ids: Int[Array, "B T"]) -> Array:
    """True at each segment's first token; a row's first non-padding token is one."""
    before = previous_valid(segment_ids)
    id_before = jnp.take_along_axis(segment_ids, jnp.maximum(before, 0), axis=1)
    return (segment_ids != 0) & ((before < 0) | (id_before != segment_ids))


def rope_frequencies(config: ModelConfig, head_dim: int, kind: str) -> Float[Array, " half"]:
    """Rotary frequencies: the teacher's (with Llama 3 scaling where it has one), or base 10,000 ("own")."""
    theta = config.rope_theta if kind == "teacher" else 10000.0
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    scaling = config.rope_scaling
    if scaling is None or kind != "teacher":
        return frequencies
    # Waves longer than the original context are slowed by `factor`; between the two cut-offs the change is gradual.
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    keep = jnp.clip((turns - scaling.low_freq_factor) / span, 0.0, 1.0)
    return frequencies * (keep + (1 - keep) / scaling.factor)


def rotate(x: Float[Array, "B T H d"], positions: Int[Array, "B T"], frequencies: Float[Array, " half"]) -> Array:
    """Rotary position embedding in HF's half layout (Su et al. 2021, arXiv 2104.09864), computed in float32."""
    angles = positions[:, :, None, None] * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    a, b = jnp.split(x.astype(jnp.promote_types(x.dtype, jnp.float32)), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def repeat_heads(x: Float[Array, "B T KV d"], heads: int) -> Float[Array, "B T H d"]:
    """Each key/value head, repeated for the query heads that share it."""
    return x if x.shape[2] == heads else jnp.repeat(x, heads // x.shape[2], axis=2)


class ShortConv(nn.Module):
    """`short_conv` with a learned kernel; a new tail is returned, beside the output, where one came in."""

    config: ModelConfig
    options: ResolvedOptions
    packed: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B T H d"], segment_ids, tail):
        o = self.options
        size = o.conv_size

        def init(key, shape, dtype=jnp.float32):
            if o.conv_init == "identity":
                return jnp.zeros(shape, dtype).at[-1].set(1)
            bound = size**-0.5  # PyTorch's Conv1d default, which flash-linear-attention keeps
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        init = partitioned(init, (None, "heads", "head_dim"))
        kernel = self.param("kernel", init, (size, *x.shape[2:])).astype(x.dtype)
        past = jnp.zeros((x.shape[0], size - 1, *x.shape[2:]), x.dtype) if tail is None else tail.astype(x.dtype)
        y, new_tail = short_conv(kernel, x, segment_ids, past, packed=self.packed)
        if o.conv_activation == "silu":
            y = silu(y)
        return y, None if tail is None else new_tail


class TokenMixer(nn.Module):
    """What all linear-time mixers have in common; a subclass adds its gates and calls its recurrence.

    A subclass sets PRESETS (its options by preset) and, where flash-linear-attention merges the teacher's heads into
    fewer and larger ones, FLA_HEADS.
    """

    config: ModelConfig
    options: ResolvedOptions
    packed: bool = False
    """What `short_conv` may count on."""

    PRESETS: ClassVar[dict[str, MixerOptions]] = {}
    FLA_HEADS: ClassVar[int | None] = None

    @classmethod
    def head_layout(cls, config: ModelConfig, options: ResolvedOptions) -> tuple[int, int]:
        """(number of heads, head size) that the recurrence sees."""
        heads, size = config.num_attention_heads, config.head_dim
        if options.heads == "teacher" or cls.FLA_HEADS is None:
            return heads, size
        if heads * size % cls.FLA_HEADS:
            raise UserError(f"--model.heads fla: {cls.FLA_HEADS} heads do not divide the width {heads * size}")
        return cls.FLA_HEADS, heads * size // cls.FLA_HEADS

    @classmethod
    def init_state(cls, config: ModelConfig, options: ResolvedOptions, batch: int, max_len: int) -> State:
        """The state before the first token; `max_len` does not matter, the state's size is constant."""
        heads, size = cls.head_layout(config, options)
        state = {"memory": cls.init_memory(config, options, batch, heads, size)}
        if options.conv_size:
            kv = heads_of_kv(config, options)
            for name, n in (("q", config.num_attention_heads), ("k", kv), ("v", kv)):
                shape = (batch, options.conv_size - 1, n, config.head_dim)
                state[f"{name}_conv1d"] = jnp.zeros(shape, config.dtype)
        return state

    @classmethod
    def init_memory(cls, config, options, batch: int, heads: int, size: int) -> Any:
        """The recurrence's state: [B, H, K, V] float32 unless the mixer keeps more."""
        return jnp.zeros((batch, heads, size, size), jnp.promote_types(config.dtype, jnp.float32))

    def qkv(self, x, positions, segment_ids, state):
        """q, k, v [B, T, heads, size] as recurrences read them; new conv tails.

        In order: projection, short convolution, the teacher's norm of q and k where it has one, rotary embedding.
        """
        c, o = self.config, self.options
        kv = heads_of_kv(c, o)
        parts, tails = [], {}
        for name, n in (("q", c.num_attention_heads), ("k", kv), ("v", kv)):
            part = Dense(c, (n, c.head_dim), ("embed", "heads", "head_dim"), c.attention_bias, name=f"{name}_proj")(x)
            if o.conv_size:
                key = f"{name}_conv1d"
                tail = None if state is None else state[key]
                part, tails[key] = ShortConv(c, o, self.packed, name=key)(part, segment_ids, tail)
            if c.qk_norm and name != "v":
                part = RMSNorm(c, name=f"{name}_norm")(part)
            parts.append(part)
        q, k, v = parts
        heads, size = self.head_layout(c, o)
        if o.rope == "teacher":
            q, k = (rotate(a, positions, rope_frequencies(c, c.head_dim, "teacher")) for a in (q, k))
        k, v = (repeat_heads(a, c.num_attention_heads) for a in (k, v))
        q, k, v = (a.reshape(*a.shape[:2], heads, size) for a in (q, k, v))
        if o.rope == "own":
            q, k = (rotate(a, positions, rope_frequencies(c, size, "own")) for a in (q, k))
        return q, k, v, tails

    def record(self, **arrays: Array) -> None:
        """Leave what the recurrence is given in the collection "intermediates", where a caller asks for that.

        `jaxlin.inspect` reads keys k and gates g, beta, i and f there. Compiled programs without it are the same.
        """
        for name, array in arrays.items():
            self.sow("intermediates", name, array)

    def gate_projection(
        self, x, features: tuple[int, ...], name: str, *, rank: int = 0, random: bool = False,
        dtype: str | None = None, **kw,
    ):  # fmt: skip
        """x to gate pre-activations, in float32; low-rank where `rank` > 0, zero unless `random`.

        `dtype` is that of the product, float32 too by default.
        """
        last = nn.initializers.lecun_normal() if random else nn.initializers.zeros
        axes = ("heads", "head_dim")[: len(features)]
        inner = "embed"
        dtype = dtype or gate_dtype(self.config)
        if rank:
            x = Dense(self.config, (rank,), ("embed", None), dtype=dtype, name=f"{name}_down")(x)
            inner = None
        axes = (inner, *axes)
        return Dense(self.config, features, axes, dtype=dtype, wide=True, kernel_init=last, name=name, **kw)(x)

    def output(self, heads_out: Float[Array, "B T H d"], x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Per-head norm, output gate and o_proj of the recurrence's output; `x` is the mixer's input."""
        c, o = self.config, self.options
        y = heads_out
        if o.out_gate == "added":
            y = y + self._gate(x, y.shape[2:])
        y = self._norm(y)
        if o.out_gate in ("neutral", "random"):
            y = y * self._activate(self._gate(x, y.shape[2:]))
        y = y.astype(c.dtype)
        y = y.reshape(*y.shape[:2], c.num_attention_heads, c.head_dim)
        return Dense(
            c, (c.hidden_size,), ("heads", "head_dim", "embed"), c.attention_out_bias, inputs=2, name="o_proj"
        )(y)

    def _norm(self, y):
        kind = self.options.out_norm
        if kind == "none":
            return y
        if kind == "layernorm":  # over each head, as xLSTM's MultiHeadLayerNorm
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        per_head = kind in ("calibrated", "layernorm")
        shape, axes = (y.shape[2:], ("heads", "head_dim")) if per_head else (y.shape[-1:], ("head_dim",))
        return RMSNorm(self.config, shape, axes, name="o_norm")(y)

    def rank(self, rank: int) -> int:
        """A projection's rank: 0 is full, -1 the head size."""
        return self.head_layout(self.config, self.options)[1] if rank == -1 else rank

    def _gate(self, x, shape):
        o = self.options
        neutral = o.out_gate == "neutral"
        bias = SILU_NEUTRAL_BIAS if neutral and o.gate_activation == "silu" else 0.0
        use_bias = neutral or self.GATE_BIAS
        init = nn.initializers.constant(bias)
        # As wide as o_proj, and no part of the recurrence: a matrix product like the others.
        return self.gate_projection(
            x, shape, "g_proj", rank=self.rank(o.gate_rank), random=not neutral, dtype=self.config.dtype,
            use_bias=use_bias, bias_init=init,
        )  # fmt: skip

    GATE_BIAS: ClassVar[bool] = False

    def _activate(self, gate):
        if self.options.gate_activation == "silu":
            return nn.silu(gate)
        return nn.sigmoid(gate) * (2 if self.options.out_gate == "neutral" else 1)


def heads_of_kv(config: ModelConfig, options: ResolvedOptions) -> int:
    """Key and value heads that the weights hold."""
    merged = options.heads == "fla"
    return config.num_attention_heads if options.expand_kv or merged else config.num_key_value_heads


def memory_of(state: LayerState | None) -> Any:
    """The recurrence's state inside a mixer's state; None stands for zeros."""
    return None if state is None or state.fresh else state.part_of_stack("memory")


def next_state(state: LayerState | None, memory: Any, tails: dict[str, Array]) -> LayerState | None:
    """The mixer's state after a call: none comes out where none went in."""
    return None if state is None else state.replace(memory=memory, **tails)
