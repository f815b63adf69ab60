"""What a control set of batches does otherwise than one of prompts and responses."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from step_optim.control.given import GivenBatch, check_aligned, check_predicted, checked_batches, digest_of
from step_optim.control.listing import shown
from step_optim.control.saved_batches import write_batches

S = TypeVar("S", bound="GivenBatches")

Place = tuple[int, int]
"""Which batch an example is in, and which row of it is."""


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class GivenBatches:
    """The part of a `ControlSet` that is made of batches, one example a row.

    Batches stay whole: what is selected, or drawn from a pool, is evaluated
    with the rest of its batch, which counts nothing. The pictures of a batch
    may lie in one tensor that nobody can cut.
    """

    prompts: tuple[Tensor, ...]
    """C tensors of token ids, int64, without padding; empty where the model reads something else than tokens."""

    responses: tuple[Tensor, ...]
    """C tensors of labels, int64: those of the T_x measured positions of each example."""

    slices: Mapping[str, tuple[int, ...]]

    batches: tuple[GivenBatch, ...]

    places: tuple[Place, ...]
    """[C] Where each example is."""

    shift: bool | None = None
    """Whether the logits at position t predict the label at t + 1; None if the model has to tell."""

    @classmethod
    def of(
        cls: type[S],
        batches: Sequence[GivenBatch],
        places: Sequence[Place],
        slices: Mapping[str, tuple[int, ...]],
        shift: bool | None,
    ) -> S:
        """Build one from batches that are checked."""
        rows = [(batches[number], row) for number, row in places]
        return cls(
            prompts=tuple(batch.ids(row) for batch, row in rows),
            responses=tuple(batch.measured(row) for batch, row in rows),
            slices=slices,
            batches=tuple(batches),
            places=tuple(places),
            shift=shift,
        )

    def __repr__(self) -> str:
        sizes = {name: len(members) for name, members in self.slices.items()}
        return (
            f"{type(self).__name__}({len(self.batches)} batches, {len(self.places)} examples, "
            f"{sum(map(len, self.responses))} measured positions, slices={sizes}, device={str(self.device)!r})"
        )

    def __eq__(self, other: object) -> bool:
        """Whether both hold the same tensors, examples and slices, wherever they live."""
        if not isinstance(other, GivenBatches):
            return False
        mine, others = (dict(each.slices) for each in (self, other))
        return self is other or (mine == others and self.digest == other.digest)

    def __hash__(self) -> int:
        return hash(self.digest)

    def __add__(self: S, other: Any) -> S:
        """Return the examples of both, those of ``other`` behind; slices of the same name become one.

        Raises:
            TypeError: the other one is no control set of batches.
            ValueError: they differ in shift or device; or an example has the same labels in both, and would count
                twice.
        """
        if not isinstance(other, GivenBatches):
            raise TypeError(f"a control set of batches and {shown(other)} are of two kinds; audit them one by one")
        if self.shift != other.shift or self.device != other.device:
            raise ValueError(
                f"the control sets differ in shift ({self.shift}, {other.shift}) or device ({self.device}, "
                f"{other.device}); give both the same"
            )
        own = {key: i for i, key in enumerate(self._counted())}
        twice = next(((own[key], j) for j, key in enumerate(other._counted()) if key in own), None)
        if twice is not None:
            raise ValueError(
                f"prompt {twice[1]} of the second control set is prompt {twice[0]} of the first, with the same labels; "
                "take it out of one of them with select()"
            )
        behind, count = len(self.places), len(self.batches)
        slices = dict(self.slices)
        for name, members in other.slices.items():
            slices[name] = (*slices.get(name, ()), *(i + behind for i in members))
        places = [*self.places, *((number + count, row) for number, row in other.places)]
        return self.of([*self.batches, *other.batches], places, slices, self.shift)

    def _counted(self) -> list[tuple[str, tuple[int, ...]]]:
        return [(key, tuple(row.tolist())) for key, row in zip(self.keys(shift=False), self.responses, strict=True)]

    def __radd__(self, other: Any) -> Any:
        """Refuse a control set of prompts and responses on the left."""
        return self.__add__(other)

    @property
    def device(self) -> torch.device:
        """Where the tensors live."""
        return self.batches[0].labels.device

    @cached_property
    def digest(self) -> str:
        """A hash of all tensors, of the examples and of the shift, to recognise the control set in a checkpoint."""
        tensors = [
            (f"{number} {name}", tensor)
            for number, batch in enumerate(self.batches)
            for name, tensor in sorted({**batch.inputs, "labels": batch.labels}.items())
        ]
        return digest_of([*tensors, (f"places, shift={self.shift}", torch.tensor(self.places, device="cpu"))])

    def keys(self, *, shift: bool | None) -> list[str]:
        """[C] A hash of what each example is about: not of its labels, its padding, and what a decoder is given.

        Pictures lie in a batch as a whole, so that all of them count for each of its rows.

        Args:
            shift: whether labels are a response to the tokens before them.
        """
        return [self.batches[number].key(row, shift=shift) for number, row in self.places]

    def _prompt_keys(self) -> list[Hashable]:
        return [*self.keys(shift=self.shift)]

    def resolved(self: S, shift: bool, decoders: Sequence[Tensor | None], *, aligned: bool) -> S:
        """Return what one model reads.

        Args:
            shift: whether the logits at t predict the label at t + 1.
            decoders: decoder inputs of each batch, if they are made of its labels.
            aligned: whether labels have the shape of the input ids.

        Raises:
            ValueError: labels of another shape, or that nothing predicts.
        """
        for number, batch in enumerate(self.batches):
            if aligned:
                check_aligned(batch, number)
            if shift:
                check_predicted(batch, number)
        pairs = zip(self.batches, decoders, strict=True)
        return replace(self, shift=shift, batches=tuple(replace(batch, decoder=made) for batch, made in pairs))

    def to(self: S, device: torch.device | str) -> S:
        """Return the same control set on another device."""
        return self.of([batch.to(device) for batch in self.batches], self.places, self.slices, self.shift)

    def check_vocabulary(self, vocab_size: int, *, name: str = "input_ids") -> None:
        """Refuse token ids that a model with ``vocab_size`` tokens does not have; placeholders of pictures may be any.

        Args:
            vocab_size: of the encoder, or of the decoder.
            name: the model's argument that has the ids.
        """
        for number, batch in enumerate(self.batches):
            ids = batch.arguments.get(name) if batch.is_plain or name != "input_ids" else None
            wrong = [] if ids is None else ((ids < 0) | (ids >= vocab_size)).nonzero().tolist()
            if wrong and ids is not None:
                raise ValueError(
                    f"batch {number}, row {wrong[0][0]}: {name} has token id {int(ids[tuple(wrong[0])])}, outside the "
                    f"vocabulary of {vocab_size}; was it made with another tokenizer?"
                )

    def check_responses(self, vocab_size: int) -> None:
        """Refuse labels that a model with ``vocab_size`` logits a position has no logit of."""
        for (number, row), labels in zip(self.places, self.responses, strict=True):
            if int(labels.max()) >= vocab_size:
                raise ValueError(
                    f"batch {number}, row {row}: the label {int(labels.max())} is none of the {vocab_size} that the "
                    "model has logits of; were the labels made for another model?"
                )

    def _picked(self: S, kept: Sequence[int], slices: Mapping[str, tuple[int, ...]]) -> S:
        places = [self.places[i] for i in kept]
        numbers = sorted({number for number, _ in places})
        new = {old: number for number, old in enumerate(numbers)}
        batches = [self.batches[number] for number in numbers]
        return self.of(batches, [(new[number], row) for number, row in places], slices, self.shift)

    def decode(self, tokenizer: Any) -> Any:
        """Refuse: labels may be classes, and inputs pictures.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            "a control set of batches holds what a processor made, which is perhaps no text; decode the input_ids of "
            "its batches yourself"
        )

    def resample(self, model: Any, **options: Any) -> Any:
        """Refuse: which part of a batch is the prompt, nobody has said.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            "a control set of batches cannot draw fresh responses: make new batches from what model.generate returns, "
            "and a new control set of them (ControlSet.from_batches)"
        )

    def save(self, path: str | Path) -> None:
        """Write it as one safetensors file.

        Raises:
            ImportError: there is no safetensors.
        """
        write_batches(path, self.batches, {"places": self.places, "slices": dict(self.slices), "shift": self.shift})


def batches_and_rows(batches: Any, shift: Any) -> tuple[tuple[GivenBatch, ...], list[Place]]:
    """Check batches, and number their rows.

    Raises:
        TypeError: as `checked_batches`; ``shift`` is neither a flag nor None.
        ValueError: as `checked_batches`; with shift=True, labels that nothing predicts.
    """
    if shift is not None and not isinstance(shift, bool):
        raise TypeError(f"shift={shown(shift)} must be True (logits at t predict label t + 1), False, or None")
    found = checked_batches(batches)
    for number, batch in enumerate(found if shift else ()):
        check_aligned(batch, number)
        check_predicted(batch, number)
    return found, [(number, row) for number, batch in enumerate(found) for row in range(len(batch.labels))]
