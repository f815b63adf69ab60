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

from step_optim.resampling import draw_responses
from step_optim.slices import Slices as Slices
from step_optim.slices import checked_index
from step_optim.slices import checked_slices as checked_slices
from step_optim.texts import prompt_ids


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
        prompts: Sequence[Sequence[int] | Tensor],
        responses: Sequence[Sequence[int] | Tensor],
        slices: Slices | None = None,
        *,
        vocab_size: int | None = None,
        device: torch.device | str | None = None,
    ) -> ControlSet:
        """Build a control set from token ids.

        Args:
            prompts: C lists of ids; each needs a token, since the first
                response token is predicted from the last prompt token.
            responses: C lists of ids, at least one token each.
            slices: prompt indices, or a boolean mask [C], by slice name.
            vocab_size: to refuse ids outside the vocabulary now; `TokenKL`
                checks them against its model anyway.
            device: where the tensors live; the model's device.

        Raises:
            ValueError: an empty set or slice, a prompt or response without
                tokens, ids or indices out of range; the message names the prompt.
        """
        if len(prompts) != len(responses):
            raise ValueError(f"{len(prompts)} prompts but {len(responses)} responses; give one response a prompt")
        if not prompts:
            raise ValueError("the control set is empty; give at least one prompt with its response")
        control = cls(
            tuple(_ids(ids, f"prompt {i}", device) for i, ids in enumerate(prompts)),
            tuple(_ids(ids, f"the response of prompt {i}", device) for i, ids in enumerate(responses)),
            checked_slices(slices or {}, len(prompts)),
        )
        if vocab_size is not None:
            control.check_vocabulary(vocab_size)
        return control

    @classmethod
    def from_texts(
        cls,
        tokenizer: Any,
        prompts: Sequence[Any],
        responses: Sequence[str],
        slices: Slices | None = None,
        *,
        max_response_tokens: int | None = None,
        device: torch.device | str | None = None,
    ) -> ControlSet:
        """Build a control set from texts.

        Args:
            tokenizer: a Hugging Face tokenizer, or any callable
                ``tokenizer(text, add_special_tokens=bool)["input_ids"]``.
            prompts: texts, or lists of chat messages
                (``[{"role": "user", "content": ...}]``), which go through the
                tokenizer's chat template with the generation prompt added.
            responses: texts, tokenized without special tokens.
            slices: prompt indices by slice name.
            max_response_tokens: cut longer responses here.
            device: where the tensors live; the model's device.
        """
        prompts_ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
        response_ids = [
            list(tokenizer(text, add_special_tokens=False)["input_ids"])[:max_response_tokens] for text in responses
        ]
        return cls.from_ids(prompts_ids, response_ids, slices, device=device)

    def __len__(self) -> int:
        """C, the number of prompts."""
        return len(self.prompts)

    @property
    def device(self) -> torch.device:
        """Where the tensors live."""
        return self.prompts[0].device

    @property
    def response_tokens(self) -> int:
        """R, response tokens over all prompts."""
        return sum(len(response) for response in self.responses)

    @property
    def digest(self) -> str:
        """A hash of all token ids, to recognise the control set in a checkpoint."""
        ids = [
            [prompt.tolist(), response.tolist()] for prompt, response in zip(self.prompts, self.responses, strict=True)
        ]
        return hashlib.sha256(json.dumps(ids).encode()).hexdigest()

    def to(self, device: torch.device | str) -> ControlSet:
        """Return the same control set on another device."""
        return ControlSet(
            tuple(ids.to(device) for ids in self.prompts),
            tuple(ids.to(device) for ids in self.responses),
            self.slices,
        )

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuse ids that a model with ``vocab_size`` tokens does not have."""
        for i, (prompt, response) in enumerate(zip(self.prompts, self.responses, strict=True)):
            largest = int(torch.cat([prompt, response]).max())
            if largest >= vocab_size:
                raise ValueError(
                    f"prompt {i} of the control set has token id {largest}, outside the vocabulary of {vocab_size}; "
                    "was it made with another tokenizer?"
                )

    def select(self, indices: Iterable[int]) -> ControlSet:
        """Return some of the prompts; slices that lose all of theirs are dropped."""
        kept = list(indices)
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
        out = self._held_out(held_out, seed)
        if not out or len(out) == len(self):
            raise ValueError(f"held_out={held_out!r} leaves one part of {len(self)} prompts empty")
        return self.select(i for i in range(len(self)) if i not in out), self.select(sorted(out))

    def _held_out(self, held_out: float | Sequence[int] | Sequence[str], seed: int) -> set[int]:
        if not isinstance(held_out, (int, float)):
            names = [item for item in held_out if isinstance(item, str)]
            unknown = [name for name in names if name not in self.slices]
            if unknown:
                raise ValueError(f"held_out names unknown slices {unknown}; known slices: {sorted(self.slices)}")
            out = {i for name in names for i in self.slices[name]}
            out |= {int(item) for item in held_out if not isinstance(item, str)}
            return {checked_index(i, len(self), "held_out") for i in out}
        if not 0 < held_out < 1:
            raise ValueError(f"held_out={held_out} must lie between 0 and 1, or list prompts or slices")
        generator = torch.Generator().manual_seed(seed)
        covered = {i for members in self.slices.values() for i in members}
        rest = [i for i in range(len(self)) if i not in covered]
        parts = [list(members) for members in self.slices.values()] + ([rest] if rest else [])
        for _ in range(FAIR_DRAWS):
            drawn = _draw(parts, held_out, generator)
            if all(0 < len(drawn.intersection(part)) < len(part) for part in parts if len(part) > 1):
                break
        return drawn

    def save(self, path: str | Path) -> None:
        """Write it as one JSON file."""
        record = {
            "prompts": [ids.tolist() for ids in self.prompts],
            "responses": [ids.tolist() for ids in self.responses],
            "slices": {name: list(members) for name, members in self.slices.items()},
        }
        Path(path).write_text(json.dumps(record) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path, *, device: torch.device | str | None = None) -> ControlSet:
        """Read what `save` wrote."""
        record = json.loads(Path(path).read_text(encoding="utf-8"))
        return cls.from_ids(record["prompts"], record["responses"], record["slices"], device=device)

    def resample(
        self,
        model: Any,
        *,
        max_new_tokens: int = 32,
        temperature: float = 1.0,
        seed: int = 0,
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
            **generate: further arguments of ``model.generate``.
        """
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, **generate}
        responses = draw_responses(model, self.prompts, seed, options)
        return ControlSet.from_ids(self.prompts, responses, self.slices, device=self.device)


FAIR_DRAWS = 100
"""Attempts to split overlapping slices so that both parts keep all of them; a partition needs one."""


def _draw(parts: list[list[int]], fraction: float, generator: torch.Generator) -> set[int]:
    """Draw a fraction of every part, never the last of any."""
    drawn: set[int] = set()
    for part in parts:
        wanted = min(max(1, round(fraction * len(part))), len(part) - 1)
        for place in torch.randperm(len(part), generator=generator).tolist():
            i = part[place]
            if len(drawn.intersection(part)) < wanted and all(
                set(other) - drawn - {i} for other in parts if i in other
            ):
                drawn.add(i)
    return drawn


def _ids(ids: Sequence[int] | Tensor, what: str, device: torch.device | str | None) -> Tensor:
    tensor = torch.as_tensor(ids, device=device)
    if tensor.numel() == 0:
        raise ValueError(f"{what} has no tokens; every prompt needs one and every response needs one")
    if tensor.dim() != 1 or tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"{what} must be a flat list of token ids, not {tuple(tensor.shape)} of {tensor.dtype}")
    if int(tensor.min()) < 0:
        raise ValueError(f"{what} has the negative token id {int(tensor.min())}; ids start at 0")
    return tensor.to(torch.long, copy=True)
