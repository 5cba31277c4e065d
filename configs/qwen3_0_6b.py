"""Qwen3-0.6B on 3B tokens of FineWeb, the paper's budget.

Command:  python3 train.py --config qwen3_0_6b --mixer gated_deltanet
Hardware: one GPU with 80 GiB, or a slice of a TPU pod with --mesh.fsdp. Time and result: not measured.
"""

from dataclasses import replace

from jaxlin.command_line import load_config_file
from jaxlin.config import ModelConfig, RunConfig

ARCHITECTURE = ModelConfig(
    vocab_size=151936,
    hidden_size=1024,
    intermediate_size=3072,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    rope_theta=1000000.0,
    rms_norm_eps=1e-6,
    max_position_embeddings=32768,
    qk_norm=True,
)


def config(base: RunConfig) -> RunConfig:
    """The paper's budget and recipe, on another family's teacher."""
    return replace(load_config_file("smollm2_1_7b", base), teacher="Qwen/Qwen3-0.6B-Base", teacher_config=ARCHITECTURE)
