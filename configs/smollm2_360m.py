"""SmolLM2-360M on 3B tokens of FineWeb, the paper's budget: 80M, 160M and 2.76B tokens for the three stages.

Command:  python3 train.py --config smollm2_360m --mixer gated_deltanet
          the paper's larger budget of 10B: add --stage3.tokens 9_760_000_000 (paper_code's: --stage1.tokens
          240_000_000 --stage2.tokens 1_760_000_000 --stage3.tokens 8_000_000_000)
          without the hub: add --teacher demo --text FILES... --tokens N
Hardware: one GPU with 40 GiB. Time and result: not measured at this budget; docs/results.md has what was.
"""

from dataclasses import replace

from jaxlin.config import ModelConfig, RunConfig

TEACHER = "HuggingFaceTB/SmolLM2-360M"
FINEWEB = "hf:HuggingFaceFW/fineweb:sample-10BT"
ARCHITECTURE = ModelConfig(
    vocab_size=49152,
    hidden_size=960,
    intermediate_size=2560,
    num_hidden_layers=32,
    num_attention_heads=15,
    num_key_value_heads=5,
    head_dim=64,
    rope_theta=100000.0,
    max_position_embeddings=8192,
)


def config(base: RunConfig) -> RunConfig:
    """The paper's run."""
    return replace(base, teacher=TEACHER, teacher_config=ARCHITECTURE, text=(FINEWEB,))
