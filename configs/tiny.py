"""A random tiny teacher through all three stages: for tests, and to see that everything works.

Command:  python3 train.py --config tiny --mixer gated_deltanet
Hardware: any CPU. Time: under a minute. Result: each stage's loss falls; the text it writes is noise.
"""

from dataclasses import replace

from jaxlin.config import ModelConfig, RunConfig

TEACHER = ModelConfig(
    vocab_size=272,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)


def config(base: RunConfig) -> RunConfig:
    """The smallest run that goes through everything."""
    return replace(
        base,
        teacher="random",
        teacher_config=TEACHER,
        dtype="float32",
        stage1=replace(base.stage1, tokens=8_192, batch_size=4),
        stage2=replace(base.stage2, tokens=8_192, batch_size=4),
        stage3=replace(base.stage3, tokens=8_192, batch_size=8),
        data=replace(base.data, seq_len=64, eval_tokens=1_024),
        log_every=4,
        save_every=8,
        remat="none",
    )
