"""Prompts with their responses, as token ids in named slices: what a control set holds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from step_optim.control.ids import check_responses, check_vocabulary
from step_optim.control.slices import checked_indices
from step_optim.control.splitting import held_out_prompts
from step_optim.control.tokenizer import Tokenizer
from step_optim.movement import Movement
from step_optim.precision import Precision

if TYPE_CHECKING:
    from typing_extensions import Self

LINE = 120
SHOWN_SLICES = 12
"""A repr of more characters takes two lines, and it names this many slices at most."""


@dataclass(frozen=True)
class Pairs:
    """C prompts, each with one response. It is immutable: its methods return new ones."""

    prompts: tuple[Tensor, ...]
    """C tensors of token ids, int64, at least one token each."""

    responses: tuple[Tensor, ...]
    """C tensors of token ids, int64: the T_x tokens of each response."""

    slices: Mapping[str, tuple[int, ...]]
    """Prompt indices of each slice: a partition, a cover, or any other family of sets."""

    def __len__(self) -> int:
        """C, the number of prompts."""
        return len(self.prompts)

    def __repr__(self) -> str:
        """Counts of prompts, response tokens and prompts in each slice; in two lines if one is too long."""
        sizes = [f"{name!r}: {len(members)}" for name, members in self.slices.items()]
        if len(sizes) > SHOWN_SLICES:
            sizes[SHOWN_SLICES:] = [f"and {len(sizes) - SHOWN_SLICES} more"]
        line = (
            f"{type(self).__name__}({len(self)} prompts, {self.response_tokens} response tokens, "
            f"slices={{{', '.join(sizes)}}}, device={str(self.device)!r})"
        )
        return line if len(line) <= LINE else line.replace(", slices=", ",\n    slices=", 1)

    def __eq__(self, other: object) -> bool:
        """Whether both hold the same ids and slices, wherever their tensors live."""
        if not isinstance(other, Pairs):
            return NotImplemented
        return self is other or (dict(self.slices) == dict(other.slices) and self._ids() == other._ids())

    def __hash__(self) -> int:
        return hash(self.digest)

    def __add__(self, other: Self) -> Self:
        """Return the prompts of both, those of ``other`` behind; slices of the same name become one.

        Raises:
            ValueError: they are on different devices; or a prompt has the same
                response in both, and so would count twice. With two different
                responses a prompt may be in both.
        """
        if not isinstance(other, Pairs):
            return NotImplemented
        if self.device != other.device:
            raise ValueError(f"one control set is on {self.device}, the other on {other.device}; use to(...)")
        own = {repr(pair): i for i, pair in enumerate(self._ids())}
        for j, pair in enumerate(other._ids()):
            if repr(pair) in own:
                raise ValueError(
                    f"prompt {j} of the second control set is prompt {own[repr(pair)]} of the first, with the same "
                    "response; take it out of one of them with select()"
                )
        slices = dict(self.slices)
        for name, members in other.slices.items():
            slices[name] = slices.get(name, ()) + tuple(len(self) + i for i in members)
        return replace(
            self, prompts=self.prompts + other.prompts, responses=self.responses + other.responses, slices=slices
        )

    def _prompt_keys(self) -> list[Hashable]:
        """What each prompt is told by, whatever its response."""
        return [tuple(prompt.tolist()) for prompt in self.prompts]

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

    def to(self, device: torch.device | str) -> Self:
        """Return the same control set on another device."""
        return replace(
            self,
            prompts=tuple(ids.to(device) for ids in self.prompts),
            responses=tuple(ids.to(device) for ids in self.responses),
        )

    def precision(self, movement: Movement) -> Precision:
        """Return how far a movement that was measured on these prompts carries to others like them.

        >>> from step_optim import ControlSet
        >>> control = ControlSet.from_ids([[1], [2]], [[3], [4]])
        >>> str(control.precision(Movement.over([0.01, 0.03], control.slices)))
        'mean ±50% (2 prompts)'

        Args:
            movement: of a candidate (`StepRecord.candidate`), or what a KL closure on this control set returned.

        Raises:
            ValueError: the KL of each prompt is not known, or they are other prompts.
        """
        found = movement.precision
        if found.prompts != len(self):
            raise ValueError(f"the movement is over {found.prompts} prompts, and the control set has {len(self)}")
        return found

    def decode(self, tokenizer: Any) -> list[tuple[str, str]]:
        """Return the text of each prompt and of its response, as they are read: with all special tokens.

        Args:
            tokenizer: the Hugging Face tokenizer or processor that the ids are of.

        Raises:
            TypeError: it cannot decode.
        """
        reader = Tokenizer(tokenizer)
        return [(reader.text(prompt), reader.text(response)) for prompt, response in self._ids()]

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuse ids that a model with ``vocab_size`` tokens does not have."""
        check_vocabulary((torch.cat(pair) for pair in zip(self.prompts, self.responses, strict=True)), vocab_size)

    def check_responses(self, vocab_size: int) -> None:
        """Refuse responses that a model with ``vocab_size`` logits a token cannot say."""
        check_responses(self.responses, vocab_size)

    def select(self, indices: Iterable[int]) -> Self:
        """Return some of the prompts, by index or boolean mask [C]; slices that lose all of theirs are dropped."""
        kept = checked_indices(indices, len(self), "select")
        if not kept:
            raise ValueError("no prompt is left in the control set; select at least one")
        place = {old: new for new, old in enumerate(kept)}
        slices = {name: tuple(place[i] for i in members if i in place) for name, members in self.slices.items()}
        return self._picked(kept, {name: members for name, members in slices.items() if members})

    def _picked(self, kept: Sequence[int], slices: Mapping[str, tuple[int, ...]]) -> Self:
        prompts, responses = (tuple(rows[i] for i in kept) for rows in (self.prompts, self.responses))
        return replace(self, prompts=prompts, responses=responses, slices=slices)

    def split(self, held_out: float | Sequence[int] | Sequence[str], *, seed: int = 0) -> tuple[Self, Self]:
        """Split into (control, held out).

        Args:
            held_out: a fraction, drawn within every slice (and among the
                prompts in none), so that both parts keep all slices of two
                prompts or more as far as overlaps allow; or prompt indices;
                or names of slices to hold out whole.
            seed: of the draw.

        A prompt that is there more than once, with other responses, is in one
        part only.

        Raises:
            TypeError: none of these forms.
            ValueError: an unknown slice or prompt, a fraction out of range, a
                part without prompts, or one prompt in both.
        """
        out = held_out_prompts(held_out, self.slices, self._prompt_keys(), seed)
        return self.select(i for i in range(len(self)) if i not in out), self.select(sorted(out))
