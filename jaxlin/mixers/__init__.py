"""The token mixers. MIXERS names them; docs/code.md says what else one needs that is added."""

from __future__ import annotations

from dataclasses import fields, replace

from jaxlin.config import PRESETS, MixerOptions, UserError
from jaxlin.mixers.deltanet import DeltaNet
from jaxlin.mixers.gated_deltanet import GatedDeltaNet
from jaxlin.mixers.gla import GatedLinearAttention
from jaxlin.mixers.kda import KimiDeltaAttention
from jaxlin.mixers.linear_attention import LinearAttention
from jaxlin.mixers.mlstm import MLSTM
from jaxlin.mixers.retnet import RetNet
from jaxlin.mixers.softmax import SoftmaxAttention
from jaxlin.pattern import pattern_of

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
        raise UserError(f"--mixer {mixer or '(a name is missing)'}: choose one of {', '.join(MIXERS)}")
    if preset not in PRESETS:
        raise UserError(f"--preset {preset}: choose one of {', '.join(PRESETS)}")
    if preset not in (presets := MIXERS[mixer].PRESETS):
        raise UserError(f"--preset {preset}: {mixer} has only {', '.join(presets)}")
    chosen = presets[preset]
    given = {f.name: getattr(overrides, f.name) for f in fields(overrides)}
    resolved = {name: getattr(chosen, name) if value is None else value for name, value in given.items()}
    return MixerOptions(**resolved)


LEAST = {"conv_size": 0, "feature_dim": 0, "gate_rank": -1, "decay_rank": -1, "gate_soft_cap": 0}


def check_overrides(mixers: tuple[str, ...], overrides: MixerOptions) -> None:
    """Refuse options that none of `mixers` has, and numbers out of range."""
    for field in fields(overrides):
        if (value := getattr(overrides, field.name)) is None:
            continue
        flag = f"--model.{field.name.replace('_', '-')} {value}"
        if not any(has_option(mixer, field.name) for mixer in mixers):
            known = ", ".join(mixer for mixer in MIXERS if has_option(mixer, field.name))
            raise UserError(f"{flag}: {pattern_of(mixers)} has no such option, only {known}; leave it out")
        if value < LEAST.get(field.name, value):
            raise UserError(f"{flag}: must be at least {LEAST[field.name]}")


def has_option(mixer: str, name: str) -> bool:
    """Whether a mixer reads an option: some preset of its own sets it."""
    return any(getattr(options, name) is not None for options in MIXERS[mixer].PRESETS.values())


def own_options(mixer: str, options: MixerOptions) -> MixerOptions:
    """`options` without those that the mixer does not have: older versions wrote down some."""
    return replace(options, **{f.name: None for f in fields(options) if not has_option(mixer, f.name)})
