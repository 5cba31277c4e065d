"""From the text of a prompt to its tokens, as lm-eval-harness does it."""

from __future__ import annotations

from typing import Any


def encode(tokenizer: Any, text: str, *, chat: bool = False, prefix: str = "") -> list[int]:
    """Tokens of `text`, and of `prefix`, which begins the answer; with `chat`, in the tokenizer's chat template.

    Special tokens are those that the tokenizer adds, unless the text begins with them.
    """
    if chat:
        messages = [{"role": "user", "content": text}]
        messages += [{"role": "assistant", "content": prefix}] if prefix else []
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=not prefix, continue_final_message=bool(prefix)
        )
    elif prefix:
        text = f"{text} {prefix}"
    begun = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
    return tokenizer(text, verbose=False, **({"add_special_tokens": False} if begun else {}))["input_ids"]
