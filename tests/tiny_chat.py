"""A tiny random model that talks ChatML in four letters, now and then ending its turn by itself."""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp

from jaxlin import convert
from jaxlin.runs import Teacher
from tests.models import TEACHER, random_params, student_of

LETTERS = "abcd"
TEMPERATURE = 0.001
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def chat_tokenizer(template: str | None = CHATML):
    """Bytes, the two marks of ChatML, and `template`."""
    tokenizer = convert.byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer


def chat_model(mixer: str = "softmax", **options) -> Teacher:
    """All scores are 0 but those of two times two letters and an end, alike, one triple the negative of the other.

    One triple is always likeliest, so sampled answers end with a chance of a third at every token, and are text whose
    bytes are the exact tokens; TEMPERATURE leaves the other tokens no chance.
    """
    tokenizer = chat_tokenizer()
    config = student_of(mixer, teacher=replace(TEACHER, vocab_size=264, tie_word_embeddings=False), **options)
    params = random_params(config)
    first, second = jnp.array(tokenizer("ab<|im_end|>cd<|endoftext|>")["input_ids"]).reshape(2, 3)
    head = params["lm_head"]["kernel"]
    one = head[:, :1]
    head = jnp.zeros_like(head).at[:, first].set(one).at[:, second].set(-one)
    return Teacher(config, params | {"lm_head": {"kernel": head}}, tokenizer)
