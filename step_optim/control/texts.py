"""From texts and chat messages to token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from step_optim.control.listing import is_list, items, response_texts, shown
from step_optim.control.tokenizer import Tokenizer
from step_optim.control.turns import NO_END, end_of_turn


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

    def __init__(self, tokenizer: Any, prompts: Any, responses: Any = ()) -> None:
        self._tokenizer = Tokenizer(tokenizer)
        self.prompts = items(prompts, "prompts")
        for i, prompt in enumerate(self.prompts):
            _check_prompt(prompt, i)
        self.responses = response_texts(responses)

    def prompt_ids(self) -> list[list[int]]:
        """Return the ids of each prompt, up to where the policy begins its response."""
        return [
            self._before_response(prompt)
            if isinstance(prompt, str)
            else self._tokenizer.ids(self._tokenizer.render(prompt))
            for prompt in self.prompts
        ]

    def response_ids(self, *, end: bool = False) -> list[list[int]]:
        """Return the ids of each response without special tokens; with the one that ends it, if ``end``.

        Raises:
            ValueError: no token ends a response; the message names the prompt.
        """
        rows = [self._tokenizer.ids(response) for response in self.responses]
        if not end:
            return rows
        ends = [self._end(prompt, i) for i, prompt in enumerate(self.prompts)]
        return [row if row[-1:] == [last] else [*row, last] for row, last in zip(rows, ends, strict=False)]

    def _end(self, prompt: Any, i: int) -> int:
        """The token that ends the response to a prompt."""
        tokenizer = self._tokenizer
        last = tokenizer.end_of_sequence if isinstance(prompt, str) else end_of_turn(tokenizer, prompt)
        if last is None:
            raise ValueError(f"end_of_turn=True: no token ends the response of prompt {i}; {NO_END}")
        return last

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
        whole, bare = self._tokenizer.ids(text, special=True), self._tokenizer.ids(text)
        tails = _common_tails(whole, bare)
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
        if self._tokenizer.ids(text)[-1:] not in ([], self._tokenizer.ids(text, special=True)[-1:]):
            raise ValueError(
                f"the tokenizer reads {shown(text)} as other tokens when it adds special tokens, so it cannot be told "
                "which of them it appends; give token ids, ControlSet.from_ids"
            )
        return 0


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


def _common_tails(whole: Sequence[int], bare: Sequence[int]) -> list[int]:
    """How many ids before each end of ``whole`` equal the last ones of ``bare``: of no ids left out, of one, of all.

    The Z-algorithm on the reversed ids, in linear time.

    >>> _common_tails([9, 1, 2, 7], [1, 2])
    [0, 2, 0, 0, 0]
    """
    ids: list[Any] = [*reversed(bare), None, *reversed(whole)]
    lengths, low, high = [0] * len(ids), 0, 0
    for i in range(1, len(ids)):
        length = min(high - i, lengths[i - low]) if i < high else 0
        while i + length < len(ids) and ids[length] == ids[i + length]:
            length += 1
        lengths[i] = length
        if i + length > high:
            low, high = i, i + length
    return [*lengths[len(bare) + 1 :], 0]
