"""What the demo trains on, and the control set on which its movement is measured."""

from __future__ import annotations

from jinja2 import TemplateError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from step_optim import ControlSet

Messages = list[dict[str, str]]

TRAINING = (
    "Tell me a short story about a lighthouse.",
    "Why is the sky blue?",
    "How do I divide a cake fairly among five guests?",
    "Explain what a Python list comprehension does.",
)

SLICES = ("story", "fact", "math", "code")
"""Of the standard control set."""
PROMPTS, RESPONSE_TOKENS = 20, 12


def chat(tokenizer: PreTrainedTokenizerBase, question: str) -> Messages:
    """Return the question as a chat; an empty system message replaces the template's own, which can be long."""
    messages = [{"role": "system", "content": ""}, {"role": "user", "content": question}]
    try:
        tokenizer.apply_chat_template(messages, tokenize=False)
    except TemplateError:  # some templates know no system role
        return messages[1:]
    return messages


def control_set(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> ControlSet:
    """Take five standard prompts of each slice, which nobody trains on, with what the model says by itself."""
    return ControlSet.standard(model, tokenizer, PROMPTS, SLICES, max_new_tokens=RESPONSE_TOKENS, progress=False)
