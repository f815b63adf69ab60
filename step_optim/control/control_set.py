"""ControlSet: the prompts, with their responses, on which movement is measured."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from step_optim.control.files import read_record, write_record
from step_optim.control.ids import check_responses, check_vocabulary, checked_ids, rows_of_ids
from step_optim.control.progress import Progress
from step_optim.control.resampling import draw_responses
from step_optim.control.slices import Slices as Slices
from step_optim.control.slices import by_text, checked_indices
from step_optim.control.slices import checked_slices as checked_slices
from step_optim.control.splitting import held_out_prompts
from step_optim.control.texts import Texts


@dataclass(frozen=True)
class ControlSet:
    """Prompts with teacher-forced or sampled responses, in named slices.

    Build it with `from_texts` or `from_ids`. It is immutable; `resample`,
    `split` and `to` return new ones.

    >>> control = ControlSet.from_ids([[1, 2], [3]], [[4], [5, 6]], slices={"a": [0], "b": [1]})
    >>> len(control), control.response_tokens
    (2, 3)
    """

    prompts: tuple[Tensor, ...]
    """C tensors of token ids, int64, at least one token each."""

    responses: tuple[Tensor, ...]
    """C tensors of token ids, int64: the T_x tokens of each response."""

    slices: Mapping[str, tuple[int, ...]]
    """Prompt indices of each slice: a partition, a cover, or any other family of sets."""

    @classmethod
    def from_ids(
        cls,
        prompts: Iterable[Sequence[int] | Tensor] | Mapping[str, Any],
        responses: Iterable[Sequence[int] | Tensor] | Mapping[str, Any],
        slices: Slices | None = None,
        *,
        vocab_size: int | None = None,
        device: torch.device | str | None = None,
    ) -> ControlSet:
        """Build a control set from token ids.

        Args:
            prompts: C lists of ids; each needs a token, since the first
                response token is predicted from the last prompt token. Or
                what a tokenizer made of C texts; padding is left out.
            responses: C lists of ids, at least one token each; or likewise.
            slices: prompt indices, or a boolean mask [C], by slice name; or
                C labels, the slice of each prompt.
            vocab_size: to refuse ids outside the vocabulary now; `TokenKL`
                checks them against its model anyway.
            device: where the tensors live; the model's device. If None, that
                of the first tensor given, and the CPU for plain lists.

        Raises:
            TypeError: prompts, responses or slices in another form.
            ValueError: an empty set or slice, a prompt or response without
                tokens, ids or indices out of range; the message names the prompt.
        """
        prompt_rows, response_rows = rows_of_ids(prompts, "prompts"), rows_of_ids(responses, "responses")
        count = len(prompt_rows)
        if count != len(response_rows):
            raise ValueError(f"{count} prompts but {len(response_rows)} responses; give one response a prompt")
        if not count:
            raise ValueError("the control set is empty; give at least one prompt with its response")
        if device is None:
            device = next((ids.device for ids in prompt_rows + response_rows if isinstance(ids, Tensor)), "cpu")
        control = cls(
            tuple(checked_ids(ids, f"prompt {i}", device) for i, ids in enumerate(prompt_rows)),
            tuple(checked_ids(ids, f"the response of prompt {i}", device) for i, ids in enumerate(response_rows)),
            checked_slices(slices, count),
        )
        if vocab_size is not None:
            control.check_vocabulary(vocab_size)
        return control

    @classmethod
    def from_texts(
        cls,
        tokenizer: Any,
        prompts: Iterable[Any],
        responses: Iterable[str],
        slices: Slices | Mapping[str, Sequence[Any]] | None = None,
        *,
        max_response_tokens: int | None = None,
        device: torch.device | str | None = None,
    ) -> ControlSet:
        """Build a control set from texts.

        Args:
            tokenizer: a Hugging Face tokenizer or processor, or any callable
                ``tokenizer(text, add_special_tokens=bool)["input_ids"]``.
            prompts: texts, or lists of chat messages
                (``[{"role": "user", "content": ...}]``), which go through the
                tokenizer's chat template with the generation prompt added.
                Special tokens that the tokenizer puts before a text stay;
                what it appends (``</s>``) is left out, as at generation.
            responses: texts, tokenized without special tokens.
            slices: as for `from_ids`; prompts may also be named by their own
                texts, ``{"math": ["What is 2+2?"]}``.
            max_response_tokens: cut longer responses here.
            device: where the tensors live; the model's device. If None, the CPU.

        Raises:
            TypeError: one text, or one conversation, in the place of a list
                of them; or anything else that is no text.
            ValueError: as for `from_ids`; or a slice names a text that is no prompt.
        """
        if max_response_tokens is not None and max_response_tokens < 1:
            raise ValueError(f"max_response_tokens={max_response_tokens} must be at least 1, or None")
        texts = Texts(tokenizer, prompts, responses)
        return cls.from_ids(
            texts.prompt_ids(),
            [ids[:max_response_tokens] for ids in texts.response_ids()],
            by_text(slices, texts.prompts),
            device=device,
        )

    def __len__(self) -> int:
        """C, the number of prompts."""
        return len(self.prompts)

    def __repr__(self) -> str:
        sizes = {name: len(members) for name, members in self.slices.items()}
        return (
            f"{type(self).__name__}({len(self)} prompts, {self.response_tokens} response tokens, "
            f"slices={sizes}, device={str(self.device)!r})"
        )

    def __eq__(self, other: object) -> bool:
        """Whether both hold the same ids and slices, wherever their tensors live."""
        if not isinstance(other, ControlSet):
            return NotImplemented
        return self is other or (dict(self.slices) == dict(other.slices) and self._ids() == other._ids())

    def __hash__(self) -> int:
        return hash(self.digest)

    def _ids(self) -> list[list[list[int]]]:
        """Prompt and response of each prompt, as plain ids."""
        pairs = zip(self.prompts, self.responses, strict=True)
        return [[prompt.tolist(), response.tolist()] for prompt, response in pairs]

    @property
    def device(self) -> torch.device:
        """Where the tensors live."""
        return self.prompts[0].device

    @property
    def response_tokens(self) -> int:
        """R, response tokens over all prompts."""
        return sum(self.response_lengths)

    @property
    def response_lengths(self) -> list[int]:
        """T_x, response tokens of each prompt."""
        return [len(response) for response in self.responses]

    @property
    def prompt_of_row(self) -> Tensor:
        """[R] the prompt of each response token."""
        lengths = torch.tensor(self.response_lengths, device="cpu")
        return torch.repeat_interleave(torch.arange(len(self), device="cpu"), lengths).to(self.device)

    @property
    def digest(self) -> str:
        """A hash of all token ids, to recognise the control set in a checkpoint."""
        return hashlib.sha256(json.dumps(self._ids()).encode()).hexdigest()

    def to(self, device: torch.device | str) -> ControlSet:
        """Return the same control set on another device."""
        return ControlSet(
            tuple(ids.to(device) for ids in self.prompts),
            tuple(ids.to(device) for ids in self.responses),
            self.slices,
        )

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuse ids that a model with ``vocab_size`` tokens does not have."""
        check_vocabulary((torch.cat(pair) for pair in zip(self.prompts, self.responses, strict=True)), vocab_size)

    def check_responses(self, vocab_size: int) -> None:
        """Refuse responses that a model with ``vocab_size`` logits a token cannot say."""
        check_responses(self.responses, vocab_size)

    def select(self, indices: Iterable[int]) -> ControlSet:
        """Return some of the prompts, by index or boolean mask [C]; slices that lose all of theirs are dropped."""
        kept = checked_indices(indices, len(self), "select")
        place = {old: new for new, old in enumerate(kept)}
        slices = {name: tuple(place[i] for i in members if i in place) for name, members in self.slices.items()}
        if not kept:
            raise ValueError("no prompt is left in the control set; select at least one")
        return ControlSet(
            tuple(self.prompts[i] for i in kept),
            tuple(self.responses[i] for i in kept),
            {name: members for name, members in slices.items() if members},
        )

    def split(self, held_out: float | Sequence[int] | Sequence[str], *, seed: int = 0) -> tuple[ControlSet, ControlSet]:
        """Split into (control, held out).

        Args:
            held_out: a fraction, drawn within every slice (and among the
                prompts in none), so that both parts keep all slices of two
                prompts or more as far as overlaps allow; or prompt indices;
                or names of slices to hold out whole.
            seed: of the draw.
        """
        out = held_out_prompts(held_out, self.slices, len(self), seed)
        return self.select(i for i in range(len(self)) if i not in out), self.select(sorted(out))

    def save(self, path: str | Path) -> None:
        """Write it as one JSON file."""
        record = {
            "prompts": [ids.tolist() for ids in self.prompts],
            "responses": [ids.tolist() for ids in self.responses],
            "slices": {name: list(members) for name, members in self.slices.items()},
        }
        write_record(path, record)

    @classmethod
    def load(cls, path: str | Path, *, device: torch.device | str | None = None) -> ControlSet:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is no control set; the message says what it lacks.
        """
        record = read_record(path)
        try:
            return cls.from_ids(record["prompts"], record["responses"], record["slices"], device=device)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} holds no valid control set: {error}") from error

    def resample(
        self,
        model: Any,
        *,
        max_new_tokens: int = 32,
        temperature: float = 1.0,
        seed: int = 0,
        progress: Progress = None,
        **generate: Any,
    ) -> ControlSet:
        """Draw fresh responses from the current policy.

        Movement is then measured where the policy goes now, not where a fixed
        text once went. The training's random streams are left alone. A
        `TokenKL` on the new set starts a new reference and a new pi_ref.

        Args:
            model: a Hugging Face model with ``generate``.
            max_new_tokens: longest response; an end-of-sequence token ends it
                earlier and is kept.
            temperature: of the sampling.
            seed: of the draw.
            progress: None shows a bar on a terminal, True everywhere, False
                nowhere; or a function of (done, total), called after each prompt.
            **generate: further arguments of ``model.generate``. What they do
                not say is plain sampling from the policy: the options in the
                model's own ``generation_config`` have no effect, but for the
                end-of-sequence tokens.

        Raises:
            TypeError: a model without ``generate``, or with an encoder.
            ValueError: an argument out of range, or one that makes several
                sequences, or another prompt.
        """
        responses = draw_responses(
            model,
            self.prompts,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            progress=progress,
            **generate,
        )
        return ControlSet.from_ids(self.prompts, responses, self.slices, device=self.device)
