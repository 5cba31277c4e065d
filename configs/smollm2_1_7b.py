"""SmolLM2-1.7B on 3B tokens of FineWeb, the paper's budget: 80M, 160M and 2.76B tokens for the three stages.

Command:  python3 train.py --config smollm2_1_7b --mixer gated_deltanet
          the paper's larger budget of 10B: add --stage3.tokens 9_760_000_000 (paper_code's: --stage1.tokens
          240_000_000 --stage2.tokens 1_760_000_000 --stage3.tokens 8_000_000_000)
          without the hub: add --teacher demo --text FILES... --tokens N
Hardware: one GPU with 80 GiB (46 GiB at the peak), or a slice of a TPU pod with --mesh.fsdp.
Time:     on one H200 stage 3 runs at 29,800 tokens/s, 26 hours for its 2.76B tokens (at 31,600 with --remat dots and
          batches of 32, 58 GiB). Result: not measured at this budget; docs/results.md has what was.
"""

from dataclasses import replace

from jaxlin.config import ModelConfig, RunConfig

TEACHER = "HuggingFaceTB/SmolLM2-1.7B"
FINEWEB = "hf:HuggingFaceFW/fineweb:sample-10BT"
ARCHITECTURE = ModelConfig(
    vocab_size=49152,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=24,
    num_attention_heads=32,
    num_key_value_heads=32,
    head_dim=64,
    rope_theta=130000.0,
    max_position_embeddings=8192,
)


def config(base: RunConfig) -> RunConfig:
    """The paper's run."""
    if base.preset == "recommended":
        base = replace(base, stage3=replace(base.stage3, lr=2e-4, lr_new=2e-4))
    return replace(base, teacher=TEACHER, teacher_config=ARCHITECTURE, text=(FINEWEB,))
