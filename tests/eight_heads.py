"""A config file for tests: configs/tiny.py made smaller, with eight heads and sizes that eight devices divide."""

from dataclasses import replace

from jaxlin.command_line import load_config_file
from jaxlin.config import RunConfig


def config(base: RunConfig) -> RunConfig:
    """Four steps of each stage."""
    tiny = load_config_file("tiny", base)
    assert tiny.teacher_config is not None
    return replace(
        tiny,
        teacher_config=replace(
            tiny.teacher_config,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=8,
            num_key_value_heads=8,
            head_dim=4,
        ),
        stage1=replace(tiny.stage1, tokens=1_024, batch_size=8),
        stage2=replace(tiny.stage2, tokens=1_024, batch_size=8),
        stage3=replace(tiny.stage3, tokens=2_048, batch_size=16),
        data=replace(tiny.data, seq_len=32, eval_tokens=160),
        log_every=1,
        save_every=2,
    )
