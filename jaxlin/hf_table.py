"""Parameters by their places in the tree and by their Hugging Face names: one table for both directions."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import flax.traverse_util
import numpy as np
from flax import linen as nn

from jaxlin.config import ModelConfig
from jaxlin.student import abstract_params


@dataclass(frozen=True)
class Entry:
    """One parameter: where it is in the tree, what Hugging Face calls it, and its shape in both (of one layer)."""

    path: tuple[str, ...]
    name: str
    hf_shape: tuple[int, ...]
    shape: tuple[int, ...]
    layers: range
    """Numbers of the layers that are stacked on a leading axis; empty for a parameter outside the layers."""

    @property
    def names(self) -> list[str]:
        """The HF tensors of this parameter, one a layer."""
        return [self.name.format(layer=i) for i in self.layers] if self.layers else [self.name]

    @property
    def stacked_shape(self) -> tuple[int, ...]:
        """The shape of the parameter in the tree."""
        return (len(self.layers), *self.shape) if self.layers else self.shape

    @property
    def transposed(self) -> bool:
        """HF keeps linear maps as [out, in], convolutions as [channels, 1, taps]; kernels are the other way around."""
        return self.path[-1] == "kernel"

    def from_hf(self, tensor: np.ndarray) -> np.ndarray:
        """HF's layout to ours, one layer."""
        return (tensor.T if self.transposed else tensor).reshape(self.shape)

    def to_hf(self, leaf: np.ndarray) -> np.ndarray:
        """Our layout to HF's, one layer."""
        return leaf.reshape(self.hf_shape[::-1]).T if self.transposed else leaf.reshape(self.hf_shape)


def table(config: ModelConfig) -> list[Entry]:
    """Every parameter of a model, in the order of their paths, the head last.

    Names are those of transformers' classes where the mixer is softmax alone, and otherwise of
    `hub/modeling_jaxlin.py`, whose modules are called as ours.
    """
    tree: dict[tuple[str, ...], Any] = dict(flax.traverse_util.flatten_dict(nn.unbox(abstract_params(config))))
    paths = sorted(tree, key=lambda path: path[0] == "lm_head")
    return [_entry(path, tree[path].shape, config) for path in paths]


def _entry(path: tuple[str, ...], shape: tuple[int, ...], config: ModelConfig) -> Entry:
    layers = range(0)
    where = ["model", *path] if path[0] != "lm_head" else list(path)
    if path[0] == "layers":
        layers = range(int(path[1].removeprefix("block_")), config.num_hidden_layers, config.period)
        where[2], shape = "{layer}", shape[1:]
        if config.mixer == ("softmax",) and path[2] == "mixer":
            where[3] = "self_attn"
    hf_shape = shape
    if path[-1] in ("kernel", "embedding"):
        where[-1] = "weight"
    if path[-1] == "bias":
        hf_shape = (prod(shape),)
    if path[-1] == "kernel":
        inputs = 2 if path[-2] == "o_proj" else 1
        hf_shape = (prod(shape[inputs:]), prod(shape[:inputs]))
        if path[-2].endswith("_conv1d"):
            hf_shape = (hf_shape[0], 1, hf_shape[1])
    return Entry(path, ".".join(where), hf_shape, shape, layers)
