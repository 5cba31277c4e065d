"""One layer's state inside the states of all layers, for a kernel that overwrites it there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import Array, lax


class InStack(NamedTuple):
    """The array of one layer inside that of all, [L, ...]; `layer` is a scalar int32."""

    stack: Array
    layer: Array

    def read(self) -> Array:
        """A copy of it."""
        return lax.dynamic_index_in_dim(self.stack, self.layer, 0, keepdims=False)

    def write(self, value: Array) -> InStack:
        """With another value."""
        value = value.astype(self.stack.dtype)
        return InStack(lax.dynamic_update_index_in_dim(self.stack, value, self.layer, 0), self.layer)


def is_in_stack(x: Any) -> bool:
    """Whether `x` is one, for jax.tree functions."""
    return isinstance(x, InStack)


def on_copy(op: Callable[[Any], tuple[Any, Any]], state: Any) -> tuple[Any, Any]:
    """op(state) -> (o, new state), for an op that takes arrays; the first of a state may be in a stack."""
    first, *rest = jax.tree.leaves(state, is_leaf=is_in_stack)
    if not isinstance(first, InStack):
        return op(state)
    o, new = op((first.read(), *rest) if rest else first.read())
    return o, (first.write(new[0]), *new[1:]) if rest else first.write(new)
