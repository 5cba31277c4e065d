"""A config file for tests: smaller than configs/tiny.py, with eight heads and sizes that eight devices divide."""

from dataclasses import replace

from jaxlin.config import ModelConfig, RunConfig

TEACHER = ModelConfig(
    vocab_size=272,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=8,
    head_dim=4,
)


def config(base: RunConfig) -> RunConfig:
    """Four steps of each stage."""
    return replace(
        base,
        teacher="random",
        teacher_config=TEACHER,
        dtype="float32",
        stage1=replace(base.stage1, tokens=1_024, batch_size=8),
        stage2=replace(base.stage2, tokens=1_024, batch_size=8),
        stage3=replace(base.stage3, tokens=2_048, batch_size=16),
        data=replace(base.data, seq_len=32, eval_tokens=160),
        log_every=1,
        save_every=2,
        remat="none",
    )
