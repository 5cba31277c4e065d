"""A tiny teacher whose tokenizer has a chat template, conversations for it, and other templates, shared by tests."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

from jaxlin.convert import byte_tokenizer, export_hf
from tests.tiny_llama import random_params

ARCHITECTURE = runpy.run_path(str(Path(__file__).parent.parent / "configs/tiny.py"))["TEACHER"]
CHATML = (
    "{% for m in messages %}"
    "{% if loop.first and m.role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# What transformers takes the mask from: the same text, with the answer and its end marked.
GENERATION = CHATML.replace(
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n",
    "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>"
    "{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}",
)
# It tells how many messages there are, so the beginning of a conversation is not the beginning of the whole.
COUNTING = "{{ messages | length }} messages\n" + CHATML
# Strict about who speaks when.
STRICT = (
    "{% for m in messages %}{% if m.role != ['user', 'assistant'][loop.index0 % 2] %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.role }}: {{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def chat_tokenizer(template=CHATML):
    """One token a byte, the two marks of ChatML, and a chat template."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = template
    return tokenizer


def chat_teacher(folder, template=CHATML):
    """The folder of a random teacher of `--config tiny`'s shape that knows the template."""
    params = random_params(ARCHITECTURE)
    for block in (params["layers"]["block_0"]["mixer"], params["layers"]["block_0"]["mlp"]):
        for part in block.values():
            part["kernel"] *= 0.05
    params["embed_tokens"]["embedding"] *= 0.05
    export_hf(params, ARCHITECTURE, folder, tokenizer=chat_tokenizer(template))
    return folder


def chats(count=40):
    """Conversations of different lengths, two to five messages each."""
    found = []
    for n in range(count):
        messages = [{"role": "system", "content": f"You are number {n}."}] if n % 3 == 0 else []
        for turn in range(1 + n % 2):
            messages += [
                {"role": "user", "content": f"What is {n} + {turn}?"},
                {"role": "assistant", "content": f"It is {n + turn}" + "!" * (n % 7)},
            ]
        found.append({"messages": messages})
    return found


def write_chats(path, records):
    """Records as JSON lines."""
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return path
