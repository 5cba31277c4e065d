"""Llama-3.2-1B on 3B tokens of FineWeb, the paper's budget.

Command:  python3 train.py --config llama3_2_1b --mixer gated_deltanet
Hardware: one GPU with 80 GiB, or a slice of a TPU pod with --mesh.fsdp. Time and result: not measured.
"""

from dataclasses import replace

from jaxlin.command_line import load_config_file
from jaxlin.config import ModelConfig, RopeScaling, RunConfig

ARCHITECTURE = ModelConfig(
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    rope_theta=500000.0,
    rope_scaling=RopeScaling(
        factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    ),
    max_position_embeddings=131072,
)


def config(base: RunConfig) -> RunConfig:
    """The paper's budget and recipe, on another family's teacher."""
    return replace(
        load_config_file("smollm2_1_7b", base), teacher="meta-llama/Llama-3.2-1B", teacher_config=ARCHITECTURE
    )
