"""Policies as rows of logits, and how two or more of them are read together, one vocabulary block at a time.

Shapes: R response rows, V vocabulary, D features of a row (hidden width, or
V), J references.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

VOCAB_BLOCK = {"cpu": 1024, "cuda": 16384}
"""Vocabulary columns read at once. On a CPU 512 to 2048 cost the same; larger ones fall out of the cache, and cost 2 to
3 times as much besides the products. An accelerator wants few launches."""

MIXED_PRODUCTS = hasattr(torch.ops.aten.mm, "dtype_out")
"""Whether this torch multiplies 16-bit matrices into a float32 one (2.8 and later)."""


@dataclass(frozen=True)
class Head:
    """A linear output head: logits = x @ weight.T + bias."""

    weight: Tensor
    """[V, D]"""

    bias: Tensor | None = None
    """[V], or None."""

    def copy(self) -> Head:
        """Return a copy that later updates of the head do not reach."""
        return Head(self.weight.detach().clone(), None if self.bias is None else self.bias.detach().clone())

    def columns(self, start: int, stop: int) -> Head:
        """Return the head of vocabulary columns start..stop, in float32 (float64 stays)."""
        bias = None if self.bias is None else at_least_float32(self.bias[start:stop])
        return Head(at_least_float32(self.weight[start:stop]), bias)

    def __call__(self, x: Tensor) -> Tensor:
        """[R, D] -> logits [R, columns]."""
        return torch.nn.functional.linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class Rows:
    """A policy on the control set: what it takes to know its distribution at every response row.

    With a head, ``x`` are the last hidden states (small); without one, the
    logits themselves. Two `Rows` with the *same* head object differ in ``x``
    alone, which makes their logits difference exact to the last bits.
    """

    x: Tensor
    """[R, D] hidden states, or [R, V] logits."""

    head: Head | None = None

    @property
    def vocab(self) -> int:
        """V."""
        return self.x.shape[-1] if self.head is None else self.head.weight.shape[0]

    def logits(self) -> Tensor:
        """[R, V]; for a few rows at a time."""
        return self.block(0, self.vocab)

    def logits64(self) -> Tensor:
        """[R, V] float64, from hidden states and head as they are: not rounded to float32 on the way."""
        if self.head is None:
            return self.x.double()
        parts = []
        for start, stop in vocab_blocks(self):
            columns = self.head.columns(start, stop)
            bias = None if columns.bias is None else columns.bias.double()
            parts.append(Head(columns.weight.double(), bias)(self.x.double()))
        return torch.cat(parts, dim=1)

    def block(self, start: int, stop: int) -> Tensor:
        """Logits of vocabulary columns start..stop, [R, stop - start]."""
        if self.head is None:
            return at_least_float32(self.x[:, start:stop])
        columns = self.head.columns(start, stop)
        return columns(self.x.to(columns.weight.dtype))

    def __getitem__(self, rows: Tensor | slice) -> Rows:
        """Return some of the rows."""
        return replace(self, x=self.x[rows])


class Scratch:
    """Memory for intermediate results, allocated once and used again by every audit."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return an uninitialised tensor; what was returned under this name before is no longer of use."""
        size, old = shape[0] * shape[1], self._buffers.get(name)
        if old is None or old.numel() < size or (old.dtype, old.device) != (dtype, device):
            old = self._buffers[name] = torch.empty(size, dtype=dtype, device=device)
        return old[:size].view(shape)

    def like(self, name: str, other: Tensor) -> Tensor:
        """Return an uninitialised tensor of the shape, dtype and device of another one."""
        return self(name, (other.shape[0], other.shape[1]), other.dtype, other.device)


def vocab_blocks(policy: Rows) -> Iterator[tuple[int, int]]:
    """Start and end of every block of the vocabulary."""
    width = VOCAB_BLOCK.get(policy.x.device.type, VOCAB_BLOCK["cuda"])
    for start in range(0, policy.vocab, width):
        yield start, min(start + width, policy.vocab)


class Reader:
    """Reads a candidate and its references together, block by block.

    A reference with the candidate's own head is read as a difference,
    (x_reference - x_candidate) W^T rather than x_reference W^T - x_candidate
    W^T, because the rounding of two large logits would drown a small movement.
    On CUDA, products of 16-bit numbers are exact in the float32 that they are
    summed in: there the logits are subtracted, which tensor cores do faster.

    Args:
        candidate: R rows.
        references: J policies of the same R rows.
        scratch: where the results lie; the next `read` writes over them.
    """

    def __init__(self, candidate: Rows, references: Sequence[Rows], scratch: Scratch) -> None:
        self._candidate, self._references, self._scratch = candidate, references, scratch
        head = candidate.head
        self.exact = all(_exact_products(policy, candidate) for policy in (candidate, *references))
        """Whether the logits themselves are subtracted."""
        wide = torch.float32 if head is None else at_least_float32(head.weight[:0]).dtype
        self._x = candidate.x if head is None or self.exact else candidate.x.to(wide)
        self._steps = [
            r.x.to(wide) - self._x if r.head is not None and r.head is head and not self.exact else None
            for r in references
        ]

    def read(self, start: int, stop: int) -> tuple[Tensor, list[Tensor]]:
        """The candidate's logits [R, stop - start], and reference - candidate logits of every reference."""
        head = self._candidate.head
        if head is None:
            z = self._candidate.block(start, stop).clone()
            return z, [_difference(reference, self._candidate, start, stop) for reference in self._references]
        if self.exact:
            z = self._logits(self._candidate, start, stop, "logits")
            return z, [
                self._logits(reference, start, stop, f"difference {j}").sub_(z)
                for j, reference in enumerate(self._references)
            ]
        columns = head.columns(start, stop)
        z = self._product(self._x, columns.weight, "logits")
        if columns.bias is not None:
            z += columns.bias
        return z, [
            _difference(reference, self._candidate, start, stop)
            if step is None
            else self._product(step, columns.weight, f"difference {j}")
            for j, (reference, step) in enumerate(zip(self._references, self._steps, strict=True))
        ]

    def _logits(self, policy: Rows, start: int, stop: int, name: str) -> Tensor:
        assert policy.head is not None
        z = self._product(policy.x, policy.head.weight[start:stop], name)
        return z if policy.head.bias is None else z.add_(policy.head.bias[start:stop])

    def _product(self, x: Tensor, weight: Tensor, name: str) -> Tensor:
        """X @ weight.T, in float32 at least."""
        dtype = torch.float32 if self.exact else x.dtype
        out = self._scratch(name, (x.shape[0], weight.shape[0]), dtype, x.device)
        if self.exact:
            return torch.ops.aten.mm.dtype_out(x, weight.T, dtype, out=out)  # type: ignore[no-any-return]
        return torch.mm(x, weight.T, out=out)


def _exact_products(policy: Rows, candidate: Rows) -> bool:
    """Whether the logits can be had from 16-bit factors and float32 sums: torch 2.8, on CUDA."""
    x, head = policy.x, policy.head
    if head is None or candidate.head is None or not x.is_cuda or not MIXED_PRODUCTS:
        return False
    return x.element_size() == 2 and x.dtype == head.weight.dtype == candidate.x.dtype


def _difference(reference: Rows, candidate: Rows, start: int, stop: int) -> Tensor:
    """Reference - candidate logits of two policies with different heads, or without."""
    if reference.head is None or candidate.head is None:
        there, here = reference.block(start, stop), candidate.block(start, stop)
        return torch.where(there == here, 0.0, there - here)  # equal infinities, masked actions, do not differ
    old, new = candidate.head.columns(start, stop), reference.head.columns(start, stop)
    x_old, x_new = candidate.x.to(old.weight.dtype), reference.x.to(old.weight.dtype)
    difference = (x_new - x_old) @ old.weight.T
    difference += x_new @ (new.weight - old.weight).T
    if old.bias is not None and new.bias is not None:
        difference += new.bias - old.bias
    return difference


def at_least_float32(x: Tensor) -> Tensor:
    """The tensor in float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()
