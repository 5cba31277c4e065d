"""One layer's place in the states of all layers, which stay where they are while a token passes through the model.

The scan over layers carries the stacked states, and each layer reads and overwrites its own part: nothing else of them
is copied. As the scan's inputs and outputs they would be written anew, whole, for every token.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxlin.kernels.in_stack import InStack


@jax.tree_util.register_pytree_node_class
class LayerState:
    """The states that a mixer keeps, by name, each stacked over layers: [L, B, ...].

    `fresh` promises that nothing was read yet: what they hold is zeros.
    """

    def __init__(self, stacked: dict[str, Any], layer: Int[Array, ""], fresh: bool = False) -> None:
        self.stacked, self._layer, self.fresh = stacked, layer, fresh

    def __getitem__(self, name: str) -> Any:
        """This layer's own, without the axis of layers."""
        return jax.tree.map(self._own, self.stacked[name])

    def _own(self, a: Array) -> Array:
        return InStack(a, self._layer).read()

    def part_of_stack(self, name: str) -> Any:
        """This layer's own, the largest array where it is: for what can overwrite it there."""
        first, *rest = jax.tree.leaves(self.stacked[name])
        own = InStack(first, self._layer)
        return own if not rest else (own, *(self._own(a) for a in rest))

    def replace(self, **new: Any) -> LayerState:
        """With these states for this layer."""

        def put(stack: Array, value: Array | InStack) -> Array:
            return value.stack if isinstance(value, InStack) else InStack(stack, self._layer).write(value).stack

        return self._with({name: jax.tree.map(put, self.stacked[name], value) for name, value in new.items()})

    def write(self, places: Int[Array, "B T"], **new: Array) -> LayerState:
        """With new entries [B, T, ...] of caches [L, B, S, ...] at these places of S, those out of range dropped."""
        rows = jnp.arange(places.shape[0])[:, None]

        def put(stack: Array, value: Array) -> Array:
            return stack.at[self._layer, rows, places].set(value.astype(stack.dtype), mode="drop")

        return self._with({name: put(self.stacked[name], value) for name, value in new.items()})

    def _with(self, new: dict[str, Any]) -> LayerState:
        return LayerState({**self.stacked, **new}, self._layer, self.fresh)

    def tree_flatten(self) -> tuple[Any, bool]:
        """For jax: the arrays, and what is static."""
        return (self.stacked, self._layer), self.fresh

    @classmethod
    def tree_unflatten(cls, fresh: bool, arrays: Any) -> LayerState:
        """For jax: the reverse."""
        stacked, layer = arrays
        return cls(stacked, layer, fresh)
