"""The token mixers. MIXERS is the one place to add one: a class with PRESETS, `__call__` and `init_state`."""

from __future__ import annotations

from dataclasses import fields

from jaxlin.config import PRESETS, MixerOptions, UserError
from jaxlin.mixers.deltanet import DeltaNet
from jaxlin.mixers.gated_deltanet import GatedDeltaNet
from jaxlin.mixers.gla import GatedLinearAttention
from jaxlin.mixers.kda import KimiDeltaAttention
from jaxlin.mixers.linear_attention import LinearAttention
from jaxlin.mixers.mlstm import MLSTM
from jaxlin.mixers.retnet import RetNet
from jaxlin.mixers.softmax import SoftmaxAttention

MIXERS = {
    "softmax": SoftmaxAttention,
    "linear_attention": LinearAttention,
    "retnet": RetNet,
    "gla": GatedLinearAttention,
    "mlstm": MLSTM,
    "deltanet": DeltaNet,
    "gated_deltanet": GatedDeltaNet,
    "kda": KimiDeltaAttention,
}


def resolve_options(mixer: str, preset: str, overrides: MixerOptions) -> MixerOptions:
    """The options of `mixer`: those set in `overrides`, and the preset's for the rest."""
    if mixer not in MIXERS:
        raise UserError(f"--mixer {mixer}: choose one of {', '.join(MIXERS)}")
    if preset not in PRESETS:
        raise UserError(f"--preset {preset}: choose one of {', '.join(PRESETS)}")
    chosen = MIXERS[mixer].PRESETS[preset]
    given = {f.name: getattr(overrides, f.name) for f in fields(overrides)}
    resolved = {name: getattr(chosen, name) if value is None else value for name, value in given.items()}
    return MixerOptions(**resolved)
