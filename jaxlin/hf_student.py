"""Students as Hugging Face folders: config.json in both directions, and the model's code, which each folder carries."""

from __future__ import annotations

import ast
import shutil
import types
import typing
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from jaxlin import hf_config
from jaxlin.command_line import from_dict
from jaxlin.config import MixerOptions, ModelConfig, UserError
from jaxlin.mixers import MIXERS

MODEL_TYPE = "jaxlin"
HUB = Path(__file__).resolve().parent / "hub"
CODE = ("configuration_jaxlin.py", "modeling_jaxlin.py", "mixers_jaxlin.py", "recurrence_jaxlin.py")
DTYPES = ("float32", "bfloat16", "float64")


def check_code(config: ModelConfig) -> None:
    """Refuse mixers that the model's code does not have. It is read, not imported: it needs torch."""
    assigned = [node for node in ast.parse((HUB / CODE[0]).read_text()).body if isinstance(node, ast.Assign)]
    known = next(ast.literal_eval(node.value) for node in assigned if ast.unparse(node.targets[0]) == "MIXERS")
    if unknown := [name for name in config.mixer if name not in known]:
        raise UserError(
            f"mixer={unknown[0]} has no counterpart in PyTorch, so transformers could not load the folder; "
            "jaxlin/hub/mixers_jaxlin.py is the place for one (and its name in configuration_jaxlin.py)"
        )


def copy_code(folder: Path) -> None:
    """Put the model's code, for `trust_remote_code`, into a folder."""
    for name in CODE:
        shutil.copyfile(HUB / name, folder / name)


def config_to_hf(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The config.json of a student whose tensors are stored in `dtype`.

    Rotary settings are spelled as in transformers 5; options that a mixer does not read (None) are left out.
    """
    hf = hf_config.shared_to_hf(config, dtype, hf_config.VARIATIONS)
    theta, scaling = hf.pop("rope_theta"), hf.pop("rope_scaling")
    return hf | {
        "architectures": ["JaxlinForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_jaxlin.JaxlinConfig",
            "AutoModelForCausalLM": "modeling_jaxlin.JaxlinForCausalLM",
        },
        "model_type": MODEL_TYPE,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta, **(scaling or {})},
        "mixer": list(config.mixer),
        "options": [{k: v for k, v in asdict(o).items() if v is not None} for o in config.options],
        "compute_dtype": config.dtype,
    }


def config_from_hf(hf: dict[str, Any], where: str) -> ModelConfig:
    """The inverse of `config_to_hf`. Raises UserError, which calls the file `where`, for what no student can have."""
    config = hf_config.config_from_hf(hf, where, MODEL_TYPE)
    mixer, options, dtype = (hf.get(key) for key in ("mixer", "options", "compute_dtype"))
    if not isinstance(mixer, list) or not mixer or any(name not in MIXERS for name in mixer):
        raise UserError(f"{where}: mixer={mixer!r} should be a list of {', '.join(MIXERS)}")
    if not isinstance(options, list) or len(options) != len(mixer) or not all(isinstance(o, dict) for o in options):
        raise UserError(f"{where}: options={options!r} should be a list of {len(mixer)} objects, one a mixer")
    if dtype not in DTYPES:
        raise UserError(f"{where}: compute_dtype={dtype!r} should be one of {', '.join(DTYPES)}")
    for name, given in zip(mixer, options, strict=True):
        _check_options(name, given, where)
    try:
        config = replace(
            config, mixer=tuple(mixer), options=tuple(from_dict(MixerOptions, o) for o in options), dtype=dtype
        )
        for name, chosen in zip(config.mixer, config.options, strict=True):
            if hasattr(MIXERS[name], "head_layout"):
                MIXERS[name].head_layout(config, chosen)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return config


def _check_options(mixer: str, given: dict[str, Any], where: str) -> None:
    """Refuse options that are missing, or that no command line could have set."""
    hints = typing.get_type_hints(MixerOptions)
    read = MIXERS[mixer].PRESETS["recommended"]
    for field in fields(MixerOptions):
        value = given.get(field.name)
        if value is None and getattr(read, field.name) is None:
            continue
        kind = next(k for k in typing.get_args(hints[field.name]) if k is not types.NoneType)
        if not _is(value, kind):
            raise UserError(f"{where}: {mixer} has {field.name}={value!r}, expected {_said(kind)}")


def _is(value: Any, kind: Any) -> bool:
    choices = typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        return isinstance(value, list) and len(value) == len(choices) and all(map(_is, value, choices))
    if choices:
        return value in choices
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is kind


def _said(kind: Any) -> str:
    choices = typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        return f"{len(choices)} numbers"
    return (
        f"one of {', '.join(choices)}" if choices else {bool: "true or false", int: "an integer"}.get(kind, "a number")
    )
