"""The token mixers of jaxlin's students in PyTorch, with the options that jaxlin's own have (`jaxlin/mixers/`).

What is computed in float32 here is what jaxlin computes so: norms, gates, rotary embedding, softmax, the recurrences
(`recurrence_jaxlin.py`) and their states; all other products are in the dtype of the weights. What follows a product
up to the next one is rounded once, at its end, as XLA and fused kernels do it on GPUs: convolution, SiLU, norms and
rotary embedding of q, k, v; norm and gate of the output.

Shapes: B batch, T tokens, D width, H heads, KV heads of keys and values, d head size, W taps of the short convolution.
`valid` [B, T] is False at padding, which stands behind a row's tokens; None means that there is none.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_jaxlin import JaxlinConfig
from .recurrence_jaxlin import delta_rule, linear_attention, mlstm

GATE_LOGIT_NORMALIZER = 16.0  # of GLA


# ---- parts -----------------------------------------------------------------------------------------------------------


class JaxlinRMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, in float32; the weight is [d], or [H, d] where heads have their own."""

    def __init__(self, shape: tuple[int, ...], eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return (y * self.weight.float()).to(x.dtype)


class ShortConv(nn.Module):
    """Causal convolution of each channel over its last W inputs, [B, T, C]; the last W - 1 of them are its state.

    The output is in float32, for the caller to round.
    """

    def __init__(self, channels: int, taps: int, activation: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, 1, taps))
        self.activation = activation

    def forward(self, x: Tensor, valid: Tensor | None, tail: Tensor | None) -> tuple[Tensor, Tensor]:
        """The output, and the inputs that the next call needs. Padding is behind the row's tokens."""
        size = self.weight.shape[-1] - 1
        tail = x.new_zeros(x.shape[0], size, x.shape[2]) if tail is None else tail
        inputs = torch.cat([tail, x], 1)
        y = F.conv1d(inputs.float().transpose(1, 2), self.weight.float(), groups=x.shape[2]).transpose(1, 2)
        read = torch.full_like(inputs[:, 0, :1], x.shape[1]) if valid is None else valid.sum(1, keepdim=True)
        rows = read.long() + torch.arange(size, device=x.device)
        tail = inputs.gather(1, rows[..., None].expand(-1, -1, x.shape[2]))
        return F.silu(y) if self.activation == "silu" else y, tail


def rope_frequencies(config: JaxlinConfig, head_dim: int, kind: str) -> Tensor:
    """Rotary frequencies [d / 2]: the teacher's (with Llama 3 scaling where it has one), or of base 10,000 ("own")."""
    rope = config.rope_parameters
    theta = rope["rope_theta"] if kind == "teacher" else 10000.0
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if kind != "teacher" or rope.get("rope_type", "default") != "llama3":
        return frequencies
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    span = rope["high_freq_factor"] - rope["low_freq_factor"]
    keep = ((turns - rope["low_freq_factor"]) / span).clamp(0.0, 1.0)
    return frequencies * (keep + (1 - keep) / rope["factor"])


def rotate(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    """Rotary embedding of x [B, T, H, d] in the half layout; float32, for the caller to round."""
    angles = positions[:, :, None, None] * frequencies.to(x.device)
    a, b = x.float().chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """Each key/value head [B, T, KV, d], repeated for the query heads that share it."""
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], dim=2)


def add_norms(mixer: nn.Module, config: JaxlinConfig) -> None:
    """q_norm and k_norm, where the teacher normalises its queries and keys: a weight [d] for all heads."""
    if config.qk_norm:
        mixer.q_norm, mixer.k_norm = (JaxlinRMSNorm((config.head_dim,), config.rms_norm_eps) for _ in "qk")


# ---- mixers ----------------------------------------------------------------------------------------------------------


class Softmax(nn.Module):
    """Causal grouped-query attention, scores and softmax in float32."""

    def __init__(self, config: JaxlinConfig, options: SimpleNamespace) -> None:
        super().__init__()
        c, bias = config, config.attention_bias
        self.config, self.shape = c, (c.num_attention_heads, c.num_key_value_heads, c.head_dim)
        heads, kv, d = self.shape
        self.q_proj = nn.Linear(c.hidden_size, heads * d, bias=bias)
        self.k_proj = nn.Linear(c.hidden_size, kv * d, bias=bias)
        self.v_proj = nn.Linear(c.hidden_size, kv * d, bias=bias)
        self.o_proj = nn.Linear(heads * d, c.hidden_size, bias=c.attention_out_bias)
        add_norms(self, c)

    def forward(self, x: Tensor, positions: Tensor, valid: Tensor | None, state: dict[str, Any] | None):
        batch, length, _ = x.shape
        heads, _, d = self.shape
        q, k, v = (p(x).view(batch, length, -1, d) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        frequencies = rope_frequencies(self.config, d, "teacher")
        q, k = (rotate(a, positions, frequencies).to(x.dtype) for a in (q, k))
        seen = torch.ones_like(positions, dtype=torch.bool) if valid is None else valid
        if state is not None:
            k, v, seen = (torch.cat([state[n], a], 1) for n, a in (("k", k), ("v", v), ("seen", seen)))
        total = k.shape[1]
        row = torch.arange(total - length, total, device=x.device)[:, None]
        column = torch.arange(total, device=x.device)
        # Padding sees itself, to stay finite.
        mask = (row >= column) & (seen[:, None] | (row == column))
        scores = torch.einsum("bthd,bshd->bhts", q.float(), repeat_heads(k, heads).float()) * d**-0.5
        weights = scores.masked_fill(~mask[:, None], torch.finfo(torch.float32).min).softmax(-1).to(v.dtype)
        y = torch.einsum("bhts,bshd->bthd", weights, repeat_heads(v, heads))
        return self.o_proj(y.reshape(batch, length, -1)), {"k": k, "v": v, "seen": seen}


class Mixer(nn.Module):
    """What linear-time mixers share: q, k, v before the recurrence; norm, gate and o_proj behind it."""

    fla_heads: int | None = None
    """Heads of the layout "fla", which merges the teacher's."""
    gate_bias = False

    def __init__(self, config: JaxlinConfig, options: SimpleNamespace) -> None:
        super().__init__()
        c, o = config, options
        self.config, self.options = c, o
        heads, width = c.num_attention_heads, c.num_attention_heads * c.head_dim
        merged = o.heads == "fla"
        kv = heads if o.expand_kv or merged else c.num_key_value_heads
        self.heads = self.fla_heads if merged and self.fla_heads else heads
        self.size = width // self.heads
        for name, n in (("q", heads), ("k", kv), ("v", kv)):
            setattr(self, f"{name}_proj", nn.Linear(c.hidden_size, n * c.head_dim, bias=c.attention_bias))
            if o.conv_size:
                setattr(self, f"{name}_conv1d", ShortConv(n * c.head_dim, o.conv_size, o.conv_activation))
        if o.out_norm != "none":
            per_head = o.out_norm in ("calibrated", "layernorm")
            self.o_norm = JaxlinRMSNorm((self.heads, self.size) if per_head else (self.size,), c.rms_norm_eps)
        if o.out_gate != "none":
            self.add_gate("g_proj", width, rank=o.gate_rank, bias=o.out_gate == "neutral" or self.gate_bias)
        self.o_proj = nn.Linear(width, c.hidden_size, bias=c.attention_out_bias)
        add_norms(self, c)

    def add_gate(self, name: str, features: int, *, rank: int = 0, bias: bool = False) -> None:
        """The weights of `gate(name, x)`: of low rank unless `rank` is 0; -1 is the head size."""
        width, rank = self.config.hidden_size, self.size if rank == -1 else rank
        if rank:
            setattr(self, f"{name}_down", nn.Linear(width, rank, bias=False))
        setattr(self, name, nn.Linear(rank or width, features, bias=bias))

    def gate(self, name: str, x: Tensor, *, wide: bool = True) -> Tensor:
        """x [B, T, D] to a gate's pre-activations in float32, the products in the weights' dtype unless `wide`."""
        last = getattr(self, name)
        for linear in (getattr(self, f"{name}_down", None), last):
            if linear is not None:
                x = F.linear(x.float(), linear.weight.float()) if wide else F.linear(x, linear.weight)
        return x.float() if last.bias is None else x.float() + last.bias.float()

    def forward(self, x: Tensor, positions: Tensor, valid: Tensor | None, state: dict[str, Any] | None):
        """x [B, T, D] and the state before it -> the mixer's output [B, T, D], and the state after it."""
        state = state or {}
        new: dict[str, Any] = {}
        q, k, v = self.qkv(x, positions, valid, state, new)
        y, new["memory"] = self.recur(x, q, k, v, state.get("memory"), valid)
        return self.output(y, x), new

    def recur(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, memory: Any, valid: Tensor | None) -> Any:
        """The recurrence: what each head reads [B, T, H, d], and the memory after the last token."""
        raise NotImplementedError

    def qkv(self, x: Tensor, positions: Tensor, valid: Tensor | None, state: dict, new: dict) -> list[Tensor]:
        """q, k, v [B, T, H, d] as the recurrence reads them; new convolution states in `new`."""
        c, o = self.config, self.options
        parts = []
        for name in "qkv":
            part = getattr(self, f"{name}_proj")(x)
            if o.conv_size:
                key = f"{name}_conv1d"
                part, new[key] = getattr(self, key)(part, valid, state.get(key))
            part = part.view(*x.shape[:2], -1, c.head_dim)
            if c.qk_norm and name != "v":
                part = getattr(self, f"{name}_norm")(part.float())
            parts.append(part)
        if o.rope == "teacher":
            frequencies = rope_frequencies(c, c.head_dim, "teacher")
            parts[:2] = [rotate(a, positions, frequencies) for a in parts[:2]]
        parts = [repeat_heads(a, c.num_attention_heads).reshape(*x.shape[:2], self.heads, self.size) for a in parts]
        if o.rope == "own":
            frequencies = rope_frequencies(c, self.size, "own")
            parts[:2] = [rotate(a, positions, frequencies) for a in parts[:2]]
        parts[:2] = self.normalized(*parts[:2])
        return [a.to(x.dtype) for a in parts]

    def normalized(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q and k [B, T, H, d] as the recurrence wants them, not yet rounded."""
        return q, k

    def output(self, y: Tensor, x: Tensor) -> Tensor:
        """Norm of each head, output gate and o_proj of y [B, T, H, d]; x is the mixer's input."""
        o, y = self.options, y.float()
        if o.out_gate == "added":
            y = y + self.gate("g_proj", x, wide=False).view_as(y)
        if o.out_norm == "layernorm":
            y = y - y.mean(-1, keepdim=True)
        if o.out_norm != "none":
            y = self.o_norm(y)
        if o.out_gate in ("neutral", "random"):
            y = y * self._activate(self.gate("g_proj", x, wide=False)).view_as(y)
        return self.o_proj(y.to(x.dtype).flatten(2))

    def _activate(self, gate: Tensor) -> Tensor:
        if self.options.gate_activation == "silu":
            return F.silu(gate)
        return gate.sigmoid() * (2 if self.options.out_gate == "neutral" else 1)


class LinearAttention(Mixer):
    """S_t = S_{t-1} + f(k_t) v_t^T;  o_t = S_t^T f(q_t), divided by f(q_t) . sum f(k) with `normalize`."""

    def __init__(self, config: JaxlinConfig, options: SimpleNamespace) -> None:
        super().__init__(config, options)
        for name in ("q_feature_map", "k_feature_map"):
            if options.feature_map == "hedgehog":
                shape = (self.heads, self.size, options.feature_dim or self.size // 2)
                setattr(self, name, nn.Parameter(torch.eye(*shape[1:]).expand(shape).clone()))
            if options.feature_map == "hadamard":
                for i in (1, 2):
                    setattr(self, f"{name}_{i}", nn.Linear(self.size, self.size))

    def recur(self, x, q, k, v, memory, valid):
        normalize = self.options.normalize
        q, k = self._features(q, "q_feature_map"), self._features(k, "k_feature_map")
        scale = 1.0 if normalize else None
        return linear_attention(q, k, v, None, memory, valid, normalize=normalize, scale=scale)

    def _features(self, x: Tensor, name: str) -> Tensor:
        kind = self.options.feature_map
        if kind == "hedgehog":
            y = torch.einsum("bthd,hdf->bthf", x, getattr(self, name)).float()
            return torch.cat([y.softmax(-1), (-y).softmax(-1)], -1).to(x.dtype)
        if kind == "hadamard":
            return getattr(self, f"{name}_1")(x) * getattr(self, f"{name}_2")(x)
        return {"elu": lambda y: F.elu(y) + 1, "relu": F.relu, "identity": lambda y: y}[kind](x)


class RetNet(Mixer):
    """S_t = gamma_h S_{t-1} + k_t v_t^T;  o_t = S_t^T q_t;  gamma_h = 1 - 2^(-5 - h), over more than 8 heads to -12."""

    fla_heads = 8

    def recur(self, x, q, k, v, memory, valid):
        n = self.heads
        exponent = torch.arange(n, device=x.device) if n <= 8 else torch.linspace(0.0, 7.0, n, device=x.device)
        return linear_attention(q, k, v, torch.log1p(-(2.0 ** (-5.0 - exponent))), memory, valid)


class GatedLinearAttention(Mixer):
    """S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T;  o_t = S_t^T q_t;  g_t = logsigmoid(W2 W1 x_t + b) / 16."""

    fla_heads = 4

    def __init__(self, config: JaxlinConfig, options: SimpleNamespace) -> None:
        super().__init__(config, options)
        self.add_gate("gk_proj", self.heads * self.size, rank=options.decay_rank, bias=True)

    def recur(self, x, q, k, v, memory, valid):
        g = F.logsigmoid(self.gate("gk_proj", x)) / GATE_LOGIT_NORMALIZER
        return linear_attention(q, k, v, g.view_as(q), memory, valid)


class MLSTM(Mixer):
    """C_t = f_t C_{t-1} + i_t k_t v_t^T;  n_t = f_t n_{t-1} + i_t k_t;  h_t = C_t^T q_t / max(|n_t . q_t|, 1)."""

    def __init__(self, config: JaxlinConfig, options: SimpleNamespace) -> None:
        super().__init__(config, options)
        self.add_gate("igate_proj", self.heads, bias=True)
        self.add_gate("fgate_proj", self.heads, bias=True)

    def recur(self, x, q, k, v, memory, valid):
        cap = self.options.gate_soft_cap
        i, f = self.gate("igate_proj", x), self.gate("fgate_proj", x)
        if cap:
            i, f = cap * torch.tanh(i / cap), cap * torch.tanh(f / cap)
        return mlstm(q, k, v, i, f, memory, valid)


class DeltaNet(Mixer):
    """S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T;  o_t = S_t^T q_t."""

    fla_heads = 16

    def __init__(self, config: JaxlinConfig, options: SimpleNamespace) -> None:
        super().__init__(config, options)
        self.add_gate("b_proj", self.heads)
        if options.qk_rmsnorm:
            self.q_rmsnorm = JaxlinRMSNorm((self.size,), config.rms_norm_eps)
            self.k_rmsnorm = JaxlinRMSNorm((self.size,), config.rms_norm_eps)

    def recur(self, x, q, k, v, memory, valid):
        beta = self.gate("b_proj", x).sigmoid()
        if self.options.allow_neg_eigval:
            beta = 2 * beta
        return delta_rule(q, k, v, beta, self.decay(x), memory, valid)

    def normalized(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        if self.options.qk_rmsnorm:
            q, k = self.q_rmsnorm(q.float()), self.k_rmsnorm(k.float())
        return _unit(q), _unit(k)

    def decay(self, x: Tensor) -> Tensor | None:
        """The log decay, [B, T, H] or [B, T, H, K]; None where there is none."""
        return None


class GatedDeltaNet(DeltaNet):
    """S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T;  g = -A softplus(a_proj x + dt_bias)."""

    fla_heads = None

    def __init__(self, config: JaxlinConfig, options: SimpleNamespace) -> None:
        super().__init__(config, options)
        self.add_gate("a_proj", self.heads)
        self.A_log = nn.Parameter(torch.zeros(self.heads))
        self.dt_bias = nn.Parameter(torch.zeros(self.heads))

    def decay(self, x: Tensor) -> Tensor:
        return -self.A_log.float().exp() * F.softplus(self.gate("a_proj", x) + self.dt_bias.float())


class KimiDeltaAttention(DeltaNet):
    """S_t = (I - beta_t k_t k_t^T) diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T, with a vector g_t a head."""

    fla_heads = None
    gate_bias = True

    def __init__(self, config: JaxlinConfig, options: SimpleNamespace) -> None:
        super().__init__(config, options)
        self.add_gate("f_proj", self.heads * self.size, rank=options.decay_rank)
        self.A_log = nn.Parameter(torch.zeros(self.heads))
        self.dt_bias = nn.Parameter(torch.zeros(self.heads, self.size))

    def decay(self, x: Tensor) -> Tensor:
        step = self.gate("f_proj", x).unflatten(-1, (self.heads, self.size))
        return -self.A_log.float().exp()[:, None] * F.softplus(step + self.dt_bias.float())


def _unit(x: Tensor) -> Tensor:
    """x with unit L2 norm over the last axis, in float32."""
    x = x.float()
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


MIXERS: dict[str, Any] = {
    "softmax": Softmax,
    "linear_attention": LinearAttention,
    "retnet": RetNet,
    "gla": GatedLinearAttention,
    "mlstm": MLSTM,
    "deltanet": DeltaNet,
    "gated_deltanet": GatedDeltaNet,
    "kda": KimiDeltaAttention,
}
