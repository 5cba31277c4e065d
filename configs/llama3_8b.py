"""Llama-3-8B on 3B tokens of FineWeb, the paper's budget: a teacher for slices of TPU pods.

Command:  python3 train.py --config llama3_8b --mixer gated_deltanet --mesh.fsdp 32 --mesh.tensor 2
          what it takes, without the teacher or a TPU: add --plan v5p:4x4x4
Hardware: 64 chips of TPU v5p (docs/tpu.md). Time and result: not measured.
"""

from dataclasses import replace

from jaxlin.command_line import load_config_file
from jaxlin.config import ModelConfig, RunConfig

ARCHITECTURE = ModelConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    rope_theta=500000.0,
    max_position_embeddings=8192,
    tie_word_embeddings=False,
)


def config(base: RunConfig) -> RunConfig:
    """The paper's budget and recipe, on a larger teacher."""
    return replace(
        load_config_file("smollm2_1_7b", base), teacher="meta-llama/Meta-Llama-3-8B", teacher_config=ARCHITECTURE
    )
