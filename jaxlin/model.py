"""A Llama-family decoder in Linen. Teacher and student are this one class; only the token mixer differs."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from jaxlin.config import MixerOptions, ModelConfig
from jaxlin.mixers import MIXERS
from jaxlin.mixers.common import Dense, RMSNorm, partitioned, positions_in_segments, precision
from jaxlin.mixers.layer_state import LayerState
from jaxlin.mixers.rounding import silu
from jaxlin.sharding import by_tokens

# What a period of blocks keeps of its forward pass for the backward one, by `RunConfig.remat`; its input always.
_STATES = jax.checkpoint_policies.save_only_these_names("chunk_states", "recurrence_outputs")
_PROJECTIONS = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
KEPT = {
    "block": None,
    "states": _STATES,
    "dots": jax.checkpoint_policies.save_from_both_policies(_STATES, _PROJECTIONS),
}


class Output(NamedTuple):
    """What a forward pass gives.

    logits: [B, T, V] float32, or None where they were not asked for.
    hidden: [B, T, D], the residual stream after the final norm.
    state: the state after the last token, or None where none came in.
    collected: the arrays named in `collect`, stacked over layers.
    """

    logits: Array | None
    hidden: Array
    state: Any
    collected: dict[str, Array]


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        c = self.config
        gate = Dense(c, (c.intermediate_size,), ("embed", "mlp"), c.mlp_bias, name="gate_proj")(x)
        up = Dense(c, (c.intermediate_size,), ("embed", "mlp"), c.mlp_bias, name="up_proj")(x)
        return Dense(c, (c.hidden_size,), ("mlp", "embed"), c.mlp_bias, name="down_proj")(silu(gate) * up)


class Block(nn.Module):
    """A pre-norm decoder layer."""

    config: ModelConfig
    mixer: str
    options: MixerOptions
    packed: bool = False

    @nn.compact
    def __call__(self, x, *, positions, segment_ids=None, state=None):
        """x [B, T, D] -> (block output, mixer output before the residual, state)."""
        c = self.config
        x = by_tokens(x)
        mixer = MIXERS[self.mixer](c, self.options, self.packed, name="mixer")
        mixed, state = mixer(
            RMSNorm(c, name="input_layernorm")(x), positions=positions, segment_ids=segment_ids, state=state
        )
        mixed = by_tokens(mixed)
        h = x + mixed
        h = h + MLP(c, name="mlp")(RMSNorm(c, name="post_attention_layernorm")(h))
        return by_tokens(h), mixed, state


def blocks(config: ModelConfig, packed: bool = False) -> list[Block]:
    """The blocks of one period of layers, for use inside a module or with `.apply`; `packed` as in `forward`."""
    pairs = zip(config.mixer, config.options, strict=True)
    return [Block(config, mixer, options, packed, name=f"block_{i}") for i, (mixer, options) in enumerate(pairs)]


class Period(nn.Module):
    """One period of the mixer pattern: the body of the scan over layers, which carries x and the states of all."""

    config: ModelConfig
    collect: tuple[str, ...] = ()
    packed: bool = False
    fresh: bool = False

    @nn.compact
    def __call__(self, carry, positions, segment_ids, number):
        x, states = carry
        states = None if states is None else dict(states)
        seen = []
        for block in blocks(self.config, self.packed):
            before = x
            state = None if states is None else LayerState(states[block.name], number, self.fresh)
            x, mixed, state = block(x, positions=positions, segment_ids=segment_ids, state=state)
            if states is not None:
                states[block.name] = state.stacked
            seen.append({"hidden_states": before, "mixer_outputs": mixed})
        collected = {name: jnp.stack([s[name] for s in seen]) for name in self.collect}
        return (x, states), collected


class LanguageModel(nn.Module):
    """Token ids to logits.

    `collect` may name "hidden_states" ([L + 1, B, T, D]: the residual stream before each block, then after the last,
    before the final norm) and "mixer_outputs" ([L, B, T, D]: the mixer's output before the residual is added).
    """

    config: ModelConfig
    remat: str = "none"
    packed: bool = False
    fresh: bool = False
    unroll: bool = False
    apart: bool = False

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        state: Any = None,
        collect: tuple[str, ...] = (),
        logits: bool = True,
    ) -> Output:
        """Segment 0 is padding; positions default to a token's rank in its segment.

        A `state` counts them on, and takes no others: caches are filled by them.
        """
        c = self.config
        if positions is not None and state is not None:
            raise ValueError("positions: not with a state, which counts them itself")
        start = None if state is None else state["position"]
        ranks, end = positions_in_segments(tokens.shape, segment_ids, start)
        positions = ranks if positions is None else positions

        embed = nn.Embed(
            c.vocab_size,
            c.hidden_size,
            dtype=c.dtype,
            embedding_init=partitioned(nn.initializers.normal(0.02), ("vocab", "embed")),
            name="embed_tokens",
        )
        carry = embed(tokens), None if state is None else state["layers"]
        (x, states), collected = self._layers(carry, positions, segment_ids, collect)

        collected = {name: a.reshape(-1, *a.shape[2:]) for name, a in collected.items()}
        if "hidden_states" in collected:
            collected["hidden_states"] = jnp.concatenate([collected["hidden_states"], x[None]])
        x = RMSNorm(c, name="norm")(x)
        if not c.tie_word_embeddings:
            head = Dense(c, (c.vocab_size,), ("embed", "vocab"), False, name="lm_head")
            scores = head(x).astype(jnp.float32) if logits or self.is_initializing() else None
        else:
            scores = project(x, embed.embedding.T, c) if logits else None
        new_state = None if state is None else {"position": end, "layers": states}
        return Output(scores, x, new_state, collected)

    def _layers(self, carry, positions, segment_ids, collect):
        """(x, states) after all layers, and what was collected, stacked over periods."""
        body, repeats = Period, self.config.num_hidden_layers // self.config.period
        if self.remat != "none":
            body = nn.remat(Period, prevent_cse=False, policy=KEPT[self.remat])
        if self.apart:
            seen = []
            for i in range(repeats):
                period = body(self.config, collect, self.packed, self.fresh, name=f"layers_{i}")
                carry, found = period(carry, positions, segment_ids, jnp.int32(i))
                seen.append(found)
            return carry, jax.tree.map(lambda *a: jnp.stack(a), *seen)
        layers = nn.scan(
            body,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast, 0),  # pyright: ignore[reportArgumentType]  # flax leaves it untyped
            length=repeats,
            unroll=repeats if self.unroll else 1,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return layers(self.config, collect, self.packed, self.fresh, name="layers")(
            carry, positions, segment_ids, jnp.arange(repeats)
        )


def apply(module: nn.Module, params: Any, *args: Any, **kwargs: Any) -> Any:
    """`module.apply`, whose own type has an extra output and takes every keyword for a setting of flax."""
    return module.apply({"params": params}, *args, **kwargs)


def forward(
    config: ModelConfig,
    params: Any,
    tokens: Int[Array, "B T"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    positions: Int[Array, "B T"] | None = None,
    state: Any = None,
    collect: tuple[str, ...] = (),
    logits: bool = True,
    remat: str = "none",
    packed: bool = False,
    fresh: bool = False,
    unroll: bool = False,
) -> Output:
    """The language model with `params`, on tokens [B, T]; see `LanguageModel`.

    `packed` promises what batches of the data pipeline keep, padding at the ends of rows only; see `short_conv`.
    `fresh` promises that `state` is that of `init_state`, which then need not be read. With `unroll` the program has no
    loop over layers; nor has it where `params` has them apart (`layers_apart`).
    """
    return apply(
        LanguageModel(config, remat, packed, fresh, unroll, apart="layers" not in params),
        params,
        tokens,
        segment_ids=segment_ids,
        positions=positions,
        state=state,
        collect=collect,
        logits=logits,
    )


def layers_apart(params: Any) -> Any:
    """The parameters with those of each period of layers by themselves: layers_0, layers_1, ... instead of layers.

    What a loop over layers reads of stacked matrices is often copied first: for a single token, as much again.
    """
    stacked = params["layers"]
    rest = {name: part for name, part in params.items() if name != "layers"}
    repeats = len(jax.tree.leaves(stacked)[0])
    return rest | {f"layers_{i}": jax.tree.map(lambda a, i=i: a[i], stacked) for i in range(repeats)}


def layers_together(params: Any) -> Any:
    """The inverse of `layers_apart`; parameters that are together stay so."""
    if "layers" in params:
        return params
    apart = {name for name in params if name.startswith("layers_")}
    periods = [params[f"layers_{i}"] for i in range(len(apart))]
    rest = {name: part for name, part in params.items() if name not in apart}
    return rest | {"layers": jax.tree.map(lambda *a: jnp.stack(a), *periods)}


def init_params(config: ModelConfig, key: jax.Array) -> Any:
    """Parameters at random."""
    return nn.unbox(LanguageModel(config).init(key, jnp.zeros((1, 1), jnp.int32)))["params"]


def project(hidden: Float[Array, "... D"], kernel: Float[Array, "D V"], config: ModelConfig) -> Float[Array, "... V"]:
    """Logits of normed hidden states: products in the compute dtype, sums in float32."""
    return jnp.matmul(
        hidden.astype(config.dtype),
        kernel.astype(config.dtype),
        precision=precision(config.dtype),
        preferred_element_type=jnp.float32,
    )


def init_state(config: ModelConfig, batch: int, max_len: int) -> Any:
    """The state before the first token: zeros, and room for `max_len` tokens where a mixer keeps them (softmax)."""
    repeats = config.num_hidden_layers // config.period
    layers = {
        f"block_{i}": jax.tree.map(
            lambda a: jnp.broadcast_to(a, (repeats, *a.shape)),
            MIXERS[mixer].init_state(config, options, batch, max_len),
        )
        for i, (mixer, options) in enumerate(zip(config.mixer, config.options, strict=True))
    }
    return {"position": jnp.zeros(batch, jnp.int32), "layers": layers}


def head_kernel(params: Any) -> Float[Array, "D V"]:
    """The output projection, tied or not."""
    return params["lm_head"]["kernel"] if "lm_head" in params else params["embed_tokens"]["embedding"].T
