"""The recurrences of jaxlin's students in PyTorch, in chunks of tokens, with states and sums in float32.

Inside a chunk of C tokens everything is matrix products; only the state walks from chunk to chunk. With the log decays
g_1 ... g_C of a chunk, a number or a vector of K a head,

    span_ij = g_{j+1} + ... + g_i,   i >= j

is how far row j has decayed when row i reads it. It is summed as it stands, never taken as a difference of cumulative
sums: exponents are then never positive, and lose no digits where gates are strong.

Shapes: B batch, T tokens, H heads, K and V sizes of keys and values, C tokens of a chunk. Arguments are [B, T, H, ...],
chunks [B, H, C, ...]. `valid` [B, T] is False at padding, which no state sees; None means that there is none.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64
CHANNEL_CHUNK = 16
"""With a gate for each channel, spans are C x C x K numbers a head."""
NORMALIZER_EPS = 1e-10


class Decays(NamedTuple):
    """What is left of a row or of the state when another reads it."""

    pair: Tensor  # [B, H, C, C] or [B, H, C, C, K]: of row j at row i, 0 for j > i
    enter: Tensor  # [B, H, C, 1 or K]: of the chunk's initial state at row i
    leave: Tensor  # [B, H, C, 1 or K]: of row j at the chunk's end
    keep: Tensor  # [B, H, 1 or K, 1]: of the initial state at the chunk's end


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: tuple[Tensor, Tensor] | None, valid: Tensor | None,
    *, normalize: bool = False, scale: float | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:  # fmt: skip
    """S_t = e^g S_{t-1} + k v^T, o_t = scale S_t^T q; with `normalize` divided by scale z_t.q, z the decayed sum of k.

    g is None, [H] or [B, T, H, (K)]; the state is (S [B, H, K, V], z [B, H, K]). Returns o in v's dtype, and the state.
    """
    g = _log_decay(g, q, valid)
    k = _where(valid, k, 0.0)
    s, z = state or _zeros(k, v)
    outputs = []
    for qc, kc, vc, gc in _chunks(_scaled(q, scale), k, v, g):
        numerator, denominator, s, z = _read_and_write(qc, kc, vc, _decays(gc), s, z)
        outputs.append(numerator / (denominator + NORMALIZER_EPS) if normalize else numerator)
    return _joined(outputs, v), (s, z)


def mlstm(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, state: tuple[Tensor, Tensor, Tensor] | None,
    valid: Tensor | None,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:  # fmt: skip
    """C_t = f C_{t-1} + i k v^T, n_t likewise with k, h_t = C_t^T q / max(|n_t.q|, 1); i, f [B, T, H] pre-activations.

    f is a sigmoid's and i an exponential's, so both are kept divided by e^m, m_t = max(log f + m_{t-1}, i)
    (arXiv 2405.04517, appendix A.2). The state is (C [B, H, K, V], n [B, H, K], m [B, H]).
    """
    forget, write = _where(valid, F.logsigmoid(f), 0.0), _where(valid, i, -torch.inf)
    s, z = state[:2] if state else _zeros(k, v)
    m = state[2] if state else torch.zeros_like(s[:, :, 0, 0])
    outputs = []
    for qc, kc, vc, fc, ic in _chunks(_scaled(q, None), k, v, forget, write):
        arrives = _spans(fc) + ic[:, :, None, :]  # log weight of row j at row i
        kept = fc.cumsum(2) + m[:, :, None]  # and of the initial state
        peak = torch.maximum(kept, arrives.amax(-1))
        m = peak[:, :, -1]
        decays = Decays(
            (arrives - peak[..., None]).exp(),
            (kept - peak).exp()[..., None],
            (arrives[:, :, -1] - m[..., None]).exp()[..., None],
            (kept[:, :, -1] - m).exp()[..., None, None],
        )
        numerator, denominator, s, z = _read_and_write(qc, kc, vc, decays, s, z)
        outputs.append(numerator / torch.maximum(denominator.abs(), (-peak).exp()[..., None]))
    return _joined(outputs, v), (s, z, m)


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, state: Tensor | None, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """S_t = (I - beta k k^T) e^g S_{t-1} + beta k v^T, o_t = S_t^T q / sqrt(K), for keys of norm 1.

    beta is [B, T, H], g as above, the state [B, H, K, V].

    What row i writes depends on what the rows before it wrote: u = beta (v - S^T k) of all rows solves a triangular
    system, after which the rule is linear attention that writes u.
    """
    g = _log_decay(g, q, valid)
    s = _zeros(k, v)[0] if state is None else state
    outputs = []
    for qc, kc, vc, bc, gc in _chunks(_scaled(q, None), k, v, _where(valid, beta, 0.0), g):
        decays, b = _decays(gc), bc[..., None]
        seen = b * _products(kc, kc, decays.pair).tril(-1)
        u = b * (vc - (kc * decays.enter) @ s)
        u = torch.linalg.solve_triangular(seen, u, upper=False, unitriangular=True)
        outputs.append((qc * decays.enter) @ s + _products(qc, kc, decays.pair) @ u)
        s = decays.keep * s + (kc * decays.leave).mT @ u
    return _joined(outputs, v), s


def _read_and_write(q: Tensor, k: Tensor, v: Tensor, decays: Decays, s: Tensor, z: Tensor) -> tuple[Tensor, ...]:
    """S^T q and z.q of every row, [B, H, C, V] and [B, H, C, 1], and the new S and z."""
    scores, entering = _products(q, k, decays.pair), q * decays.enter
    numerator = entering @ s + scores @ v
    denominator = entering @ z[..., None] + scores.sum(-1, keepdim=True)
    left = k * decays.leave
    return numerator, denominator, decays.keep * s + left.mT @ v, decays.keep[..., 0] * z + left.sum(2)


def _spans(g: Tensor) -> Tensor:
    """span_ij [B, H, C, C, ...] of g [B, H, C, ...]; minus infinity for j > i."""
    size = g.shape[2]
    row = torch.arange(size, device=g.device).view(size, 1, *(1,) * (g.dim() - 3))
    column = row.transpose(0, 1)
    spans = torch.where(row > column, g.unsqueeze(3), 0.0).cumsum(2)
    return spans.masked_fill(row < column, -torch.inf)


def _decays(g: Tensor) -> Decays:
    spans, entering = _spans(g), g.cumsum(2)
    leaving, keep = spans[:, :, -1], entering[:, :, -1]
    if g.dim() == 3:
        entering, leaving, keep = entering[..., None], leaving[..., None], keep[..., None]
    return Decays(spans.exp(), entering.exp(), leaving.exp(), keep.exp()[..., None])


def _products(q: Tensor, k: Tensor, pair: Tensor) -> Tensor:
    """q_i.k_j, each channel decayed, [B, H, C, C]."""
    if pair.dim() == 4:
        return (q @ k.mT) * pair
    return (q[:, :, :, None] * k[:, :, None] * pair).sum(-1)


def _chunks(q: Tensor, *others: Tensor) -> Iterator[list[Tensor]]:
    """[B, T, H, ...] -> pieces [B, H, C, ...] in float32, the last one shorter."""
    channels = others[-1].dim() == 4
    arrays = [x.float().transpose(1, 2) for x in (q, *others)]
    size = CHANNEL_CHUNK if channels else CHUNK
    for start in range(0, q.shape[1], size):
        yield [x[:, :, start : start + size] for x in arrays]


def _joined(chunks: list[Tensor], v: Tensor) -> Tensor:
    """Pieces [B, H, C, V] -> [B, T, H, V] in v's dtype."""
    return torch.cat(chunks, 2).transpose(1, 2).to(v.dtype)


def _scaled(q: Tensor, scale: float | None) -> Tensor:
    return q.float() * (q.shape[-1] ** -0.5 if scale is None else scale)


def _log_decay(g: Tensor | None, q: Tensor, valid: Tensor | None) -> Tensor:
    """[B, T, H] or [B, T, H, K]: 0 where there is no gate, and at padding."""
    if g is None or g.dim() == 1:
        g = (q.new_zeros(q.shape[2], dtype=torch.float32) if g is None else g).expand(q.shape[:3])
    return _where(valid, g, 0.0)


def _where(valid: Tensor | None, x: Tensor, other: float) -> Tensor:
    """x [B, T, ...], and `other` at padding."""
    return x if valid is None else torch.where(valid.view(*valid.shape, *(1,) * (x.dim() - 2)), x, other)


def _zeros(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """S and z before the first token."""
    batch, _, heads, size = k.shape
    options = {"dtype": torch.float32, "device": k.device}
    return torch.zeros(batch, heads, size, v.shape[-1], **options), torch.zeros(batch, heads, size, **options)
