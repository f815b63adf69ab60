"""The tokenizer that a control set is made with: texts and conversations to ids, and ids to texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from step_optim.control.listing import is_list, listed, shown
from step_optim.control.messages import Message, check_written, in_text, is_printed


class Tokenizer:
    """What a control set asks of a tokenizer.

    Args:
        given: a Hugging Face tokenizer or processor, or any callable
            ``tokenizer(text, add_special_tokens=bool)["input_ids"]``.

    Raises:
        TypeError: it is not callable.
    """

    def __init__(self, given: Any) -> None:
        is_processor = any(kind.__name__ == "ProcessorMixin" for kind in type(given).__mro__)
        # A processor's own call may read a text as a picture.
        self._inner: Any = getattr(given, "tokenizer", None) if is_processor else given
        if not callable(self._inner):
            raise TypeError(f"tokenizer={shown(given)} is not callable; give AutoTokenizer.from_pretrained(...)")
        able = [owner for owner in (self._inner, given) if hasattr(owner, "apply_chat_template")]
        with_template = [owner for owner in able if getattr(owner, "chat_template", None)]
        self._templates: list[Any] = with_template or able
        self.has_template = bool(with_template)

    def ids(self, text: str, *, special: bool = False) -> list[int]:
        """Return the ids of a text, with the special tokens that the tokenizer adds if ``special``."""
        ids = listed(self._inner(text, add_special_tokens=special)["input_ids"])
        if any(is_list(token) for token in ids):
            raise ValueError(f"the tokenizer gives {shown(ids)} for one text; it must be a flat list of token ids")
        return ids

    def render(self, messages: Sequence[Message], *, tools: Any = None, answered: bool = False) -> str:
        """Write a conversation as the chat template does, the special tokens included.

        Args:
            messages: of the conversation.
            tools: that the assistant may call, as the template takes them.
            answered: the last message is the answer; otherwise the text ends
                where the assistant is to begin one.

        Raises:
            TypeError: the tokenizer knows no chat templates.
            ValueError: the template leaves out a message.
        """
        if not self._templates:
            raise TypeError(
                f"a prompt is a list of chat messages, but {type(self._inner).__name__} has no "
                "apply_chat_template(); give texts, or a tokenizer with a chat template"
            )
        plain = in_text(messages)
        try:
            text = self._written(messages, tools, answered)
            if is_printed(messages, text):
                text = self._written(plain, tools, answered)
        except TypeError:  # a template that adds texts up
            if plain == list(messages):
                raise
            text = self._written(plain, tools, answered)
        check_written(messages, tools, text)
        return text

    def _written(self, messages: Sequence[Message], tools: Any, answered: bool) -> str:
        options = {} if tools is None else {"tools": tools}
        text: str = self._templates[0].apply_chat_template(
            messages, tokenize=False, add_generation_prompt=not answered, **options
        )
        return text

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of ids, with all special tokens in it.

        Raises:
            TypeError: the tokenizer cannot decode.
        """
        if not hasattr(self._inner, "decode"):
            raise TypeError(f"{type(self._inner).__name__} has no decode(); give a Hugging Face tokenizer")
        text: str = self._inner.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    @property
    def end_of_sequence(self) -> int | None:
        """The id that ends a text, if the tokenizer tells."""
        return getattr(self._inner, "eos_token_id", None)

    @cached_property
    def special(self) -> frozenset[int]:
        """Ids that stand for no text, but for that of unknown words."""
        declared = getattr(self._inner, "all_special_ids", ())
        added: Mapping[int, Any] = getattr(self._inner, "added_tokens_decoder", {})
        marked = (token for token, entry in added.items() if entry.special)
        return frozenset(declared).union(marked) - {getattr(self._inner, "unk_token_id", None)}
