"""The configuration of a jaxlin student for transformers: its teacher's, and a token mixer for each layer."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

MIXERS = ("softmax", "linear_attention", "retnet", "gla", "mlstm", "deltanet", "gated_deltanet", "kda")


class JaxlinConfig(PretrainedConfig):
    """The fields of Llama and its relatives, and the token mixers of a period of layers (`mixer`) with their `options`.

    The layers repeat the period. Options are explained in jaxlin's config.py (`MixerOptions`); none has a default here:
    the file that was exported holds all that its mixer reads.
    """

    model_type = "jaxlin"
    keys_to_ignore_at_inference = ("cache", "past_key_values")

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 2048,
        intermediate_size: int = 8192,
        num_hidden_layers: int = 24,
        num_attention_heads: int = 32,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        rope_parameters: dict[str, Any] | None = None,
        rms_norm_eps: float = 1e-5,
        max_position_embeddings: int = 2048,
        attention_bias: bool = False,
        attention_out_bias: bool = False,
        qk_norm: bool = False,
        mlp_bias: bool = False,
        mixer: tuple[str, ...] | list[str] = ("softmax",),
        options: tuple[dict[str, Any], ...] | list[dict[str, Any]] = ({},),
        tie_word_embeddings: bool = True,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        if unknown := [name for name in mixer if name not in MIXERS]:
            raise ValueError(f"mixer {unknown[0]!r} is unknown: expected one of {', '.join(MIXERS)}")
        if len(mixer) != len(options):
            raise ValueError(f"options should be one for each of the {len(mixer)} mixers, not {len(options)}")
        if num_hidden_layers % len(mixer):
            raise ValueError(f"num_hidden_layers={num_hidden_layers} is not a multiple of the {len(mixer)} mixers")
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.rope_parameters = rope_parameters or {"rope_type": "default", "rope_theta": 10000.0}
        self.rms_norm_eps = rms_norm_eps
        self.max_position_embeddings = max_position_embeddings
        self.attention_bias = attention_bias
        self.attention_out_bias = attention_out_bias
        self.qk_norm = qk_norm
        self.mlp_bias = mlp_bias
        self.mixer = list(mixer)
        self.options = [dict(chosen) for chosen in options]
        self.use_cache = use_cache
        kwargs["tie_word_embeddings"] = tie_word_embeddings
        super().__init__(**kwargs)
