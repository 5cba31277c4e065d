"""A tiny random Llama and a tokenizer for it, shared by the tests of reading and writing checkpoints."""

from dataclasses import replace

import flax.traverse_util
import jax.numpy as jnp
import numpy as np

from jaxlin.config import ModelConfig
from jaxlin.hf_table import table

CONFIG = ModelConfig(
    vocab_size=48,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    rms_norm_eps=1e-5,
    max_position_embeddings=64,
)
BIASED = replace(CONFIG, tie_word_embeddings=False, attention_bias=True, attention_out_bias=True, mlp_bias=True)
QWEN2 = dict(attention_bias=True)
QWEN3 = dict(qk_norm=True, head_dim=12)


def random_params(config, dtype="float32", seed=0):
    """Parameters of a softmax model, every element different."""
    random = np.random.RandomState(seed)
    flat = {e.path: jnp.asarray(random.standard_normal(e.stacked_shape), dtype) for e in table(config)}
    return flax.traverse_util.unflatten_dict(flat)


def word_tokenizer(size):
    """A tokenizer with `size` words: w0 w1 ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", bos_token="w1", eos_token="w2")


def assert_same(a, b):
    """Two parameter trees are equal: structure, dtypes, every bit."""
    a, b = flax.traverse_util.flatten_dict(a), flax.traverse_util.flatten_dict(b)
    assert a.keys() == b.keys()
    for path in a:
        assert a[path].dtype == b[path].dtype, path
        assert np.asarray(a[path]).tobytes() == np.asarray(b[path]).tobytes(), path


def hf_tensors(config, params):
    """The HF tensors of a tree of parameters."""
    tensors = {}
    for entry in table(config):
        leaf = params
        for key in entry.path:
            leaf = leaf[key]
        leaf = np.asarray(leaf)
        for name, row in zip(entry.names, leaf if entry.layers else leaf[None], strict=True):
            tensors[name] = np.ascontiguousarray(entry.to_hf(row))
    return tensors
