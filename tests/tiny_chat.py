"""A tiny random model that talks ChatML in three letters, now and then ending its turn by itself."""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp

from jaxlin import convert
from jaxlin.runs import Teacher
from tests.models import TEACHER, random_params, student_of

LETTERS = "abc"
TEMPERATURE = 0.03
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
    """Of all scores but those of four tokens, opposite in pairs, it makes 0: one of the four is always likeliest.

    Its answers are then text of which bytes are the exact tokens; TEMPERATURE leaves the other tokens no chance.
    """
    tokenizer = chat_tokenizer()
    config = student_of(mixer, teacher=replace(TEACHER, vocab_size=264, tie_word_embeddings=False), **options)
    params = random_params(config)
    known = jnp.array([*tokenizer(LETTERS)["input_ids"], tokenizer.convert_tokens_to_ids("<|im_end|>")])
    head = params["lm_head"]["kernel"]
    one, two = head[:, 0], head[:, 1]
    head = jnp.zeros_like(head).at[:, known].set(jnp.stack([one, -one, two, -two], axis=1))
    return Teacher(config, params | {"lm_head": {"kernel": head}}, tokenizer)
