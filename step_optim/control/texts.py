"""From texts and chat messages to token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from step_optim.control.listing import is_list, listed, shown


class Texts:
    """Prompts and responses as texts, and the tokenizer that reads them.

    Args:
        tokenizer: a Hugging Face tokenizer or processor, or any callable
            ``tokenizer(text, add_special_tokens=bool)["input_ids"]``.
        prompts: texts, or lists of chat messages.
        responses: texts.

    Raises:
        TypeError: one of these is something else; the message names it.
    """

    def __init__(self, tokenizer: Any, prompts: Any, responses: Any) -> None:
        is_processor = any(kind.__name__ == "ProcessorMixin" for kind in type(tokenizer).__mro__)
        # A processor's own call may read a text as a picture.
        self._tokenizer: Any = getattr(tokenizer, "tokenizer", None) if is_processor else tokenizer
        self._templates = [self._tokenizer, tokenizer]
        if not callable(self._tokenizer):
            raise TypeError(f"tokenizer={shown(tokenizer)} is not callable; give AutoTokenizer.from_pretrained(...)")
        self.prompts = _items(prompts, "prompts")
        self.responses = _items(responses, "responses")
        for i, prompt in enumerate(self.prompts):
            _check_prompt(prompt, i)
        for i, response in enumerate(self.responses):
            if not isinstance(response, str):
                raise TypeError(f"the response of prompt {i} is {shown(response)}; give its text")

    def prompt_ids(self) -> list[list[int]]:
        """Return the ids of each prompt, up to where the policy begins its response."""
        return [
            self._before_response(prompt) if isinstance(prompt, str) else self._chat(prompt) for prompt in self.prompts
        ]

    def response_ids(self) -> list[list[int]]:
        """Return the ids of each response, without special tokens."""
        return [self._ids(response, special=False) for response in self.responses]

    def _ids(self, text: str, *, special: bool) -> list[int]:
        ids = listed(self._tokenizer(text, add_special_tokens=special)["input_ids"])
        if any(is_list(token) for token in ids):
            raise ValueError(f"the tokenizer gives {shown(ids)} for one text; it must be a flat list of token ids")
        return ids

    def _chat(self, messages: Any) -> list[int]:
        """Ids of a conversation: the template writes the special tokens itself."""
        able = [owner for owner in self._templates if hasattr(owner, "apply_chat_template")]
        if not able:
            raise TypeError(
                f"a prompt is a list of chat messages, but {type(self._tokenizer).__name__} has no "
                "apply_chat_template(); give texts, or a tokenizer with a chat template"
            )
        owner = next((owner for owner in able if getattr(owner, "chat_template", None)), able[0])
        text = owner.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return self._ids(text, special=False)

    def _before_response(self, text: str) -> list[int]:
        """Ids of a text with what the tokenizer puts before it, without what it appends (</s>, [SEP])."""
        whole, behind = self._appended(text)
        if len(behind) > 1:
            behind = [self._appended_elsewhere(text, behind)]
        return whole[: len(whole) - behind[0]]

    def _appended(self, text: str) -> tuple[list[int], list[int]]:
        """Ids with special tokens, and how many of these the tokenizer may have appended.

        That is one number, unless the text is made of nothing but such tokens.
        """
        whole, bare = self._ids(text, special=True), self._ids(text, special=False)
        tails = [_common_tail(whole, end, bare) for end in range(len(whole), -1, -1)]
        longest = max(tails)
        behind = [count for count, tail in enumerate(tails) if tail == longest]
        whole_text_found = longest == len(bare)  # otherwise the tokenizer puts something into the text, too
        return whole, behind if whole_text_found or not longest else behind[:1]

    def _appended_elsewhere(self, text: str, behind: Sequence[int]) -> int:
        """How many ids the tokenizer appends to the other texts; none, if they cannot tell either."""
        for other in (*self.prompts, *self.responses):
            if isinstance(other, str):
                _, found = self._appended(other)
                if len(found) == 1 and found[0] in behind:
                    return found[0]
        if self._ids(text, special=False)[-1:] not in ([], self._ids(text, special=True)[-1:]):
            raise ValueError(
                f"the tokenizer reads {shown(text)} as other tokens when it adds special tokens, so it cannot be told "
                "which of them it appends; give token ids, ControlSet.from_ids"
            )
        return 0


def _items(values: Any, name: str) -> list[Any]:
    if isinstance(values, str):
        raise TypeError(f"{name}={shown(values)} is one text; give a list of texts, {name}=[{shown(values)}]")
    if not is_list(values):
        raise TypeError(f"{name}={shown(values)} is no list; give one text for each prompt, in order")
    return list(values)


def _check_prompt(prompt: Any, i: int) -> None:
    if isinstance(prompt, str):
        return
    if isinstance(prompt, Mapping):
        raise TypeError(
            f"prompt {i} is one chat message, {shown(prompt)}; a prompt is a list of messages, "
            "so put a single conversation into a list, prompts=[[{...}, ...]]"
        )
    if not is_list(prompt) or not len(prompt) or not all(isinstance(message, Mapping) for message in prompt):
        raise TypeError(
            f"prompt {i} is {shown(prompt)}; give a text, or a list of chat messages "
            '([{"role": "user", "content": ...}]); token ids go to ControlSet.from_ids'
        )


def _common_tail(whole: Sequence[int], end: int, bare: Sequence[int]) -> int:
    """How many tokens before ``end`` equal the last ones of the bare text."""
    length = 0
    while length < min(end, len(bare)) and whole[end - 1 - length] == bare[-1 - length]:
        length += 1
    return length
