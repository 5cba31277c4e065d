"""A config file for tests: configs/tiny.py made smaller, with eight heads and sizes that eight devices divide."""

from dataclasses import replace

from jaxlin.command_line import load_config_file
from jaxlin.config import RunConfig

# Adam divides a gradient by its own size, so that its first step moves every entry by the whole learning rate: where an
# entry's gradient is zero but for rounding, rounding chooses the way. Beside this such a gradient is nothing; most are
# much larger.
EPS = 1e-4


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
            # A segment's first output is (q . k) v: where q . k is near 0, its norm is rounding but for this.
            rms_norm_eps=1e-3,
            # Logits of size 1. A tied head's are a tenth of that: KLs of 0.01, in which rounding of the logarithms that
            # are subtracted, of size 6, reaches a hundred-thousandth.
            tie_word_embeddings=False,
        ),
        stage1=replace(tiny.stage1, tokens=1_024, batch_size=8, eps=EPS),
        stage2=replace(tiny.stage2, tokens=1_024, batch_size=8, eps=EPS),
        stage3=replace(tiny.stage3, tokens=2_048, batch_size=16, eps=EPS),
        data=replace(tiny.data, seq_len=32, eval_tokens=160),
        log_every=1,
        save_every=2,
    )
