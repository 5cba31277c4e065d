"""Students of jaxlin in PyTorch: a Llama decoder whose attention is one of seven linear-time token mixers, or stays.

Needs torch and transformers only; the mixers are in `mixers_jaxlin.py`. Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.utils.generic import ModelOutput

from .configuration_jaxlin import JaxlinConfig
from .mixers_jaxlin import MIXERS, JaxlinRMSNorm


class JaxlinCache:
    """What the model remembers of the tokens that it has read: a state a layer, of constant size but for softmax.

    A linear-time layer keeps its recurrence's state in float32 and the last W - 1 inputs of its convolutions; a softmax
    layer keeps keys and values. `positions` [B] counts each row's tokens, padding not among them.
    """

    is_linear = (False,)  # transformers takes the tokens that were read off the front of what it is given
    is_compileable = False
    is_croppable = False

    def __init__(self, layers: int) -> None:
        self.layers: list[dict[str, Any] | None] = [None] * layers
        self.positions: Tensor | None = None
        self.read = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns that were read, padding among them."""
        return self.read

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row beam_idx[i] was, as beam search asks for."""
        if self.positions is not None:
            self.positions = self.positions[beam_idx]
        self.layers = [_rows(state, beam_idx) for state in self.layers]


def _rows(state: Any, index: Tensor) -> Any:
    if isinstance(state, dict):
        return {name: _rows(value, index) for name, value in state.items()}
    if isinstance(state, tuple):
        return tuple(_rows(value, index) for value in state)
    return None if state is None else state.index_select(0, index.to(state.device))


@dataclass
class JaxlinOutput(ModelOutput):
    """Logits [B, T, V], the loss where labels were given, and the cache; hidden states [B, T, D] where asked for."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache: JaxlinCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class JaxlinMLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: JaxlinConfig) -> None:
        super().__init__()
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(width, inner, bias=bias)
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class JaxlinBlock(nn.Module):
    """A pre-norm decoder layer."""

    def __init__(self, config: JaxlinConfig, layer: int) -> None:
        super().__init__()
        place = layer % len(config.mixer)
        self.input_layernorm = JaxlinRMSNorm((config.hidden_size,), config.rms_norm_eps)
        self.mixer = MIXERS[config.mixer[place]](config, SimpleNamespace(**config.options[place]))
        self.post_attention_layernorm = JaxlinRMSNorm((config.hidden_size,), config.rms_norm_eps)
        self.mlp = JaxlinMLP(config)

    def forward(self, x: Tensor, positions: Tensor, valid: Tensor | None, state: dict[str, Any] | None):
        """x [B, T, D] and the layer's state before it -> the same after it."""
        mixed, state = self.mixer(self.input_layernorm(x), positions, valid, state)
        h = x + mixed
        return h + self.mlp(self.post_attention_layernorm(h)), state


class JaxlinPreTrainedModel(PreTrainedModel):
    """What transformers asks to know about the model."""

    config_class = JaxlinConfig
    base_model_prefix = "model"
    _no_split_modules = ["JaxlinBlock"]
    _is_stateful = True  # tokens cannot be taken back, as assisted generation would have it


class JaxlinModel(JaxlinPreTrainedModel):
    """Embedding, blocks and final norm."""

    def __init__(self, config: JaxlinConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(JaxlinBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm = JaxlinRMSNorm((config.hidden_size,), config.rms_norm_eps)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: JaxlinCache | None = None,
        inputs_embeds: Tensor | None = None,
        every_layer: bool = False,
    ) -> list[Tensor]:
        """The residual stream [B, T, D] after the final norm, last in a list; with `every_layer` before each block too.

        `attention_mask` [B, all columns so far] may have padding (0) anywhere. Rows are packed to the front first, so
        that padding is behind every token, and no layer need know where it was.
        """
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        batch, length, _ = x.shape
        order = valid = None
        if attention_mask is not None:
            if attention_mask.dim() != 2:
                raise ValueError(f"attention_mask should be [batch, tokens], not {tuple(attention_mask.shape)}")
            mask = attention_mask[:, -length:].bool()
            if not mask.all():
                order = mask.byte().argsort(dim=1, descending=True, stable=True)
                valid = mask.gather(1, order)
                x = _take(x, order)
        start = cache.positions if cache is not None else None
        start = x.new_zeros(batch, dtype=torch.long) if start is None else start.to(x.device)
        positions = start[:, None] + torch.arange(length, device=x.device)

        seen = []
        for i, block in enumerate(self.layers):
            seen += [x] if every_layer else []
            x, state = block(x, positions, valid, None if cache is None else cache.layers[i])
            if cache is not None:
                cache.layers[i] = state
        seen.append(self.norm(x))
        if cache is not None:
            cache.positions = start + (length if valid is None else valid.sum(1))
            cache.read += length
        return seen if order is None else [_take(y, order.argsort(dim=1)) for y in seen]


def _take(x: Tensor, order: Tensor) -> Tensor:
    """Tokens of each row of x [B, T, D] in the order [B, T]."""
    return x.gather(1, order[..., None].expand_as(x))


class JaxlinForCausalLM(JaxlinPreTrainedModel, GenerationMixin):
    """The model with its output projection; `generate` works, with a cache whose size does not grow (softmax apart)."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: JaxlinConfig) -> None:
        super().__init__(config)
        self.model = JaxlinModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """transformers would else make a cache of its own."""
        return False

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: JaxlinCache | None = None,
        past_key_values: JaxlinCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> JaxlinOutput | tuple:
        """Token ids [B, T] to logits [B, T or logits_to_keep, V].

        `cache` (`past_key_values` for older versions of transformers) is what an earlier call returned; its states are
        replaced. `attention_mask` [B, all columns so far] is 0 at padding. Labels [B, T] are the tokens themselves, and
        -100 where none is to be learned; with them no cache is kept.
        """
        cache = past_key_values if cache is None else cache
        use_cache = (self.config.use_cache if use_cache is None else use_cache) and labels is None
        if cache is None and use_cache:
            cache = JaxlinCache(self.config.num_hidden_layers)
        hidden = self.model(input_ids, attention_mask, cache, inputs_embeds, bool(output_hidden_states))
        logits = self.lm_head(hidden[-1][:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        output = JaxlinOutput(loss, logits, cache, tuple(hidden) if output_hidden_states else None)
        return output.to_tuple() if return_dict is False else output
