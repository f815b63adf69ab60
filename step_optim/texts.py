"""From texts and chat messages to token ids."""

from __future__ import annotations

from typing import Any


def prompt_ids(tokenizer: Any, prompt: Any) -> list[int]:
    """Token ids of a text, or of a list of chat messages."""
    if isinstance(prompt, str):
        return list(tokenizer(prompt, add_special_tokens=True)["input_ids"])
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
