"""Write the golden teachers: tiny random models with the hidden states and logits that transformers gives them.

    python tests/goldens/make_llama_goldens.py

Needs torch. Each llama_<variant>.npz holds the HF config (JSON), the weights (float16, under their HF names), tokens
[B, T], hidden states [L + 1, B, T, D] (before each block and after the last, before the final norm) and logits.
"""

import json
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
SHAPE = dict(
    vocab_size=48,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500.0,  # with heads of 8: one frequency kept, one blended, two divided
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
VARIANTS = {
    "gqa_untied": dict(tie_word_embeddings=False),
    "tied": dict(tie_word_embeddings=True, rope_theta=100000.0),
    "llama3": dict(tie_word_embeddings=True, rope_parameters=LLAMA3),
    "biases": dict(tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "head_dim": dict(tie_word_embeddings=True, head_dim=12),
    "mistral": dict(model_type="mistral", tie_word_embeddings=False, sliding_window=None),
    "qwen2": dict(model_type="qwen2", tie_word_embeddings=True, rope_theta=1e6),
    "qwen3": dict(model_type="qwen3", tie_word_embeddings=True, head_dim=12, rope_theta=1e6),
}


def make_model(variant: str, seed: int):
    """A random HF model, a Llama where the variant says nothing else.

    Every weight matters: nothing is 0 or 1, and float16 holds it exactly.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**{"model_type": "llama", **SHAPE, **VARIANTS[variant]})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if "norm" in name:
                noise = 1 + 0.3 * noise
            elif weight.ndim == 1 or "embed" in name:
                noise = 0.5 * noise
            else:
                noise = noise * weight.shape[1] ** -0.5
            weight.copy_(noise.half())
    return model


def run(model, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hidden states [L + 1, B, T, D] and logits; the last state is before the final norm, which HF's own output has."""
    import torch

    last = []
    handle = model.model.norm.register_forward_pre_hook(lambda module, args: last.append(args[0]))
    with torch.no_grad():
        output = model(torch.from_numpy(tokens), output_hidden_states=True)
    handle.remove()
    hidden = torch.stack([*output.hidden_states[:-1], last[0]])
    return hidden.numpy(), output.logits.numpy()


def sample_tokens(seed: int) -> np.ndarray:
    """Two sequences of 12 tokens."""
    return np.random.RandomState(seed).randint(0, SHAPE["vocab_size"], (2, 12))


def main() -> None:
    for variant in VARIANTS:
        model, tokens = make_model(variant, seed=0), sample_tokens(0)
        hidden, logits = run(model, tokens)
        weights = {name: w.detach().numpy().astype(np.float16) for name, w in model.named_parameters()}
        config = json.dumps(json.loads(model.config.to_json_string()))
        np.savez_compressed(
            HERE / f"llama_{variant}.npz",
            config=config,
            tokens=tokens.astype(np.int32),
            hidden_states=hidden,
            logits=logits,
            **weights,
        )


if __name__ == "__main__":
    main()
