"""Chat templates in the common styles, each with the tokenizer that it needs; all of them written for these tests."""

from __future__ import annotations

from dataclasses import dataclass

import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers


def byte_tokenizer(
    template: str | None = None,
    special: tuple[str, ...] = (),
    *,
    bos: str | None = None,
    eos: str | None = None,
) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of single bytes, and of two newlines as one token, so that it loses nothing of a text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate([*letters, "ĊĊ"])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ċ", "Ċ")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos, eos_token=eos)
    made.chat_template = template
    return made


@dataclass(frozen=True)
class Style:
    """A template, and what it writes for ``user: "Hi"`` and the answer "Yo"."""

    template: str
    special: tuple[str, ...]
    prompt: str
    """Up to where the assistant begins."""
    response: str
    """The answer with the token that ends it."""
    end: str
    """The text of that token."""
    bos: str | None = None
    eos: str | None = None

    def tokenizer(self) -> transformers.PreTrainedTokenizerFast:
        """The tokenizer that has this template."""
        return byte_tokenizer(self.template, self.special, bos=self.bos, eos=self.eos)


_CHATML = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")

STYLES = {
    "chatml": Style(
        "{% for m in messages %}<|im_start|>{{ m.role + '\n' + m.content }}<|im_end|>{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}",
        _CHATML,
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        "Yo<|im_end|>",
        "<|im_end|>",
        eos="<|endoftext|>",
    ),
    "thinking": Style(
        "{% for m in messages %}<|im_start|>{{ m.role + '\n' }}{% if m.role == 'assistant' and loop.last %}"
        "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m.content }}<|im_end|>{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}",
        (*_CHATML, "<think>", "</think>"),
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        "<think>\n\n</think>\n\nYo<|im_end|>",
        "<|im_end|>",
    ),
    "thinking, asked for": Style(
        "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{{ '<think>\n' }}{% endif %}",
        ("<s>", "</s>", "<|user|>", "<|assistant|>"),
        "<s><|user|>Hi<|assistant|><think>\n",
        "Yo</s>",
        "</s>",
        bos="<s>",
        eos="</s>",
    ),
    "llama 3": Style(
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>{{ '\n\n' }}"
        "{{ m.content | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>{{ '\n\n' }}{% endif %}",
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "Yo<|eot_id|>",
        "<|eot_id|>",
        bos="<|begin_of_text|>",
        eos="<|end_of_text|>",
    ),
    "gemma": Style(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}{{ '\n' + m.content | trim }}<end_of_turn>"
        "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<start_of_turn>model{{ '\n' }}{% endif %}",
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n",
        "Yo<end_of_turn>",
        "<end_of_turn>",
        bos="<bos>",
        eos="<eos>",
    ),
    "mistral": Style(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
        "{% else %}{{ '[INST] ' + m.content + ' [/INST]' }}{% endif %}{% endfor %}",
        ("<s>", "</s>", "[INST]", "[/INST]"),
        "<s>[INST] Hi [/INST]",
        " Yo</s>",
        "</s>",
        bos="<s>",
        eos="</s>",
    ),
    "two ends": Style(
        "{% for m in messages %}<|{{ m.role }}|>{{ '\n' + m.content }}<|end|>{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{{ '\n' }}{% else %}{{ eos_token }}{% endif %}",
        ("<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"),
        "<|user|>\nHi<|end|>\n<|assistant|>\n",
        "Yo<|end|>",
        "<|end|>",
        eos="<|endoftext|>",
    ),
    "an end of the last answer": Style(
        "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}"
        "{{ '<|return|>' if loop.last and m.role == 'assistant' and not add_generation_prompt else '<|end|>' }}"
        "{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|message|>{% endif %}",
        ("<|start|>", "<|message|>", "<|end|>", "<|return|>"),
        "<|start|>user<|message|>Hi<|end|><|start|>assistant<|message|>",
        "Yo<|return|>",
        "<|return|>",
    ),
    "headings": Style(
        "{% for m in messages %}### {{ m.role + ':\n' + m.content + '\n\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}",
        ("</s>",),
        "### user:\nHi\n\n### assistant:\n",
        "Yo</s>",
        "</s>",
        eos="</s>",
    ),
}
"""The two that think differ in where: one writes the thoughts of an answer, the other asks for them in every prompt."""

IN_PARTS = (
    "{% for m in messages %}<|im_start|>{{ m.role + '\n' }}{% for part in m.content %}{{ part.text }}{% endfor %}"
    "<|im_end|>{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}"
)
"""Takes messages in parts alone."""

WITH_TOOLS = (
    "{% if tools %}<|im_start|>tools{{ '\n' + tools | tojson }}<|im_end|>{{ '\n' }}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role + '\n' }}{% if m.tool_calls is defined %}"
    "{{ '<call>' + (m.tool_calls[0].function | tojson) + '</call>' }}{% else %}{{ m.content }}{% endif %}"
    "<|im_end|>{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}"
)
"""Writes the tools before the conversation; an answer that calls one says nothing else."""
