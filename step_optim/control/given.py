"""One batch as a processor or a collator makes it: what a model is called with, and the labels that are measured."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from step_optim.control.listing import is_list, shown

IGNORED = -100
"""The label of a position that is not measured, as in Hugging Face's losses and torch's `cross_entropy`."""

TEXTS = ("input_ids", "attention_mask", "token_type_ids", "decoder_input_ids", "decoder_attention_mask")
SIGNALS = ("input_features", "input_values", "inputs_embeds", "decoder_inputs_embeds")
ROW_WISE = TEXTS + SIGNALS
"""Tensors whose first dimension is the row, in every model. Others (pictures, their sizes) may lie in another order."""


@dataclass(frozen=True, eq=False)
class GivenBatch:
    """What a model is called with, and what is measured of it. It stays whole, whatever is selected from it.

    B rows, T positions of labels.
    """

    inputs: Mapping[str, Tensor]
    """By the names of the model's arguments, without the labels."""

    labels: Tensor
    """[B, T] int64; -100 where nothing is measured."""

    decoder: Tensor | None = None
    """[B, T] decoder inputs that were made of the labels; None if there are none, or the batch has its own."""

    @property
    def arguments(self) -> dict[str, Tensor]:
        """What the model is called with, decoder inputs that were made included."""
        made = {} if self.decoder is None else {"decoder_input_ids": self.decoder}
        return {**self.inputs, **made}

    @property
    def is_plain(self) -> bool:
        """Whether there is nothing but texts and sound: among ids, pictures have placeholders that are no tokens."""
        return all(name in (*ROW_WISE, "position_ids") for name in self.inputs)

    def measured(self, row: int) -> Tensor:
        """[T_x] labels of a row's measured positions."""
        return self.labels[row][self.labels[row] != IGNORED]

    def ids(self, row: int, *, stop: int | None = None) -> Tensor:
        """Token ids of a row, up to ``stop``, without padding as far as a mask tells; none if there are no tokens."""
        ids, mask = self.inputs.get("input_ids"), self.inputs.get("attention_mask")
        if ids is None or ids.dim() != 2:
            return self.labels.new_empty(0)
        kept = ids[row, :stop]
        return kept if mask is None or mask.shape != ids.shape else kept[mask[row, :stop] != 0]

    def context(self, row: int, *, shift: bool | None) -> Tensor:
        """Token ids of a row that its labels are a response to: of a causal model those before the first label."""
        measured = (self.labels[row] != IGNORED).nonzero()
        return self.ids(row, stop=int(measured[0]) if shift else None)

    def key(self, row: int, *, shift: bool | None) -> str:
        """A hash of what a row is about: its context, its sound, and all pictures of the batch.

        What says something of each token (which of them are a picture's) is left out: padding would be in it.
        """
        parts, ids = [("input_ids", self.context(row, shift=shift))], self.inputs.get("input_ids")
        for name, tensor in self.inputs.items():
            if name in SIGNALS and not name.startswith("decoder"):
                parts.append((name, tensor[row]))
            elif name not in ROW_WISE and (ids is None or tensor.shape[:2] != ids.shape):
                parts.append((name, tensor))
        return digest_of(parts)

    def to(self, device: torch.device | str) -> GivenBatch:
        """Return the same batch on another device."""
        decoder = None if self.decoder is None else self.decoder.to(device)
        inputs = {name: tensor.to(device) for name, tensor in self.inputs.items()}
        return GivenBatch(inputs, self.labels.to(device), decoder)


def digest_of(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """A hash of tensors: names, dtypes, shapes and bits."""
    found = hashlib.sha256()
    for name, tensor in tensors:
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        bits = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        copy = bytearray(len(bits))
        if copy:
            torch.frombuffer(copy, dtype=torch.uint8).copy_(bits)
        found.update(copy)
    return found.hexdigest()


def checked_batches(batches: Any) -> tuple[GivenBatch, ...]:
    """Copy batches, and refuse those that nothing can be measured on.

    Raises:
        TypeError: no list of mappings of tensors.
        ValueError: there is none; labels that are missing, of another form than [B, T], or measure nothing in a row;
            tensors of another number of rows, or on several devices. The message names the batch and the row.
    """
    if isinstance(batches, Mapping):
        raise TypeError(f"batches={shown(dict(batches))} is one batch; give a list of them, batches=[batch]")
    if not is_list(batches) or isinstance(batches, torch.Tensor):
        raise TypeError(f"batches={shown(batches)} is no list; give mappings of tensors, as model(**batch) takes them")
    found = tuple(_checked_batch(batch, number) for number, batch in enumerate(batches))
    if not found:
        raise ValueError("the control set is empty; give at least one batch")
    first = found[0].labels.device
    for number, batch in enumerate(found):
        if batch.labels.device != first:
            raise ValueError(
                f"batch {number} is on {batch.labels.device}, batch 0 on {first}; put all of them on one device"
            )
    return found


def check_aligned(batch: GivenBatch, number: int) -> None:
    """Refuse labels of another shape than the input ids, of a model that has no decoder with inputs of its own.

    Raises:
        ValueError: they are.
    """
    _check_same_shape(batch, "input_ids", number)


def check_predicted(batch: GivenBatch, number: int) -> None:
    """Refuse labels that no logits of a causal model belong to.

    Raises:
        ValueError: a label at position 0.
    """
    first = (batch.labels[:, 0] != IGNORED).nonzero().flatten().tolist()
    if first:
        raise ValueError(
            f"batch {number}, row {first[0]}: position 0 has a label, and a causal model predicts each token from "
            "those before it, so nothing predicts the first. Set it to -100, or give shift=False if the logits at t "
            "belong to label t"
        )


def _checked_batch(batch: Any, number: int) -> GivenBatch:
    if not isinstance(batch, Mapping):
        raise TypeError(f"batch {number} is {shown(batch)}; give mappings of tensors, as model(**batch) takes them")
    tensors = {name: _checked_tensor(value, name, number) for name, value in batch.items() if value is not None}
    if "labels" not in tensors:
        raise ValueError(
            f"batch {number} has no labels, only {sorted(tensors)}; give labels [B, T], with -100 where nothing is "
            "measured"
        )
    labels = _checked_labels(tensors.pop("labels"), number)
    if not tensors:
        raise ValueError(f"batch {number} has nothing but labels; give what the model is called with, too")
    found = GivenBatch(tensors, labels)
    for name, tensor in tensors.items():
        _check_beside_labels(tensor, name, labels, number)
    _check_same_shape(found, "decoder_input_ids", number)
    return found


def _checked_tensor(value: Any, name: Any, number: int) -> Tensor:
    if not isinstance(name, str):
        raise TypeError(f"batch {number} has the key {shown(name)}; keys are the names of the model's arguments")
    if not isinstance(value, Tensor):
        raise TypeError(
            f"batch {number}: {name} is {shown(value)}, no tensor; leave it out, or make it one (return_tensors='pt')"
        )
    if value.is_meta:
        raise ValueError(f"batch {number}: {name} is a tensor on the meta device, which holds no values")
    return value.detach().clone()


def _checked_labels(labels: Tensor, number: int) -> Tensor:
    if labels.dim() != 2 or 0 in labels.shape:
        raise ValueError(
            f"batch {number}: labels have the shape {tuple(labels.shape)}; give [B, T], one label a position. For one "
            "label an example (a classifier of whole texts or pictures) use PolicyKL(lambda: model(**batch).logits)"
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"batch {number}: labels are of {labels.dtype}; give token ids or classes, and -100")
    labels = labels.long()
    for row, values in enumerate(labels.tolist()):
        measured = [value for value in values if value != IGNORED]
        if not measured:
            raise ValueError(
                f"batch {number}, row {row}: no position is measured, all its labels are -100; leave the row out, or "
                "give it a label"
            )
        if min(measured) < 0:
            raise ValueError(f"batch {number}, row {row}: the label {min(measured)} is neither -100 nor 0 or more")
    return labels


def _check_beside_labels(tensor: Tensor, name: str, labels: Tensor, number: int) -> None:
    if tensor.device != labels.device:
        raise ValueError(
            f"batch {number}: {name} is on {tensor.device}, its labels on {labels.device}; put all of them on one "
            "device"
        )
    if name in ROW_WISE and (tensor.dim() == 0 or len(tensor) != len(labels)):
        raise ValueError(
            f"batch {number}: {name} of shape {tuple(tensor.shape)} does not have the {len(labels)} rows of the labels "
            f"{tuple(labels.shape)}"
        )


def _check_same_shape(batch: GivenBatch, name: str, number: int) -> None:
    ids = batch.inputs.get(name)
    if ids is not None and ids.shape != batch.labels.shape:
        raise ValueError(
            f"batch {number}: labels have the shape {tuple(batch.labels.shape)}, {name} {tuple(ids.shape)}; give one "
            "label a position, -100 where nothing is measured"
        )
