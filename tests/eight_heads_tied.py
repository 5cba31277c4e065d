"""A config file for tests: eight_heads.py with a head tied to the embedding, for runs whose sums of KLs none reads."""

from dataclasses import replace

from jaxlin.config import RunConfig
from tests import eight_heads


def config(base: RunConfig) -> RunConfig:
    """The same, but for the head."""
    untied = eight_heads.config(base)
    assert untied.teacher_config is not None
    return replace(untied, teacher_config=replace(untied.teacher_config, tie_word_embeddings=True))
