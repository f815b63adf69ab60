"""Which short ways of reading a model agree with its own logits of every prompt alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from step_optim.audit.batches import Batch, Layout
from step_optim.audit.reader import Reading, agree, difference
from step_optim.control.control_set import ControlSet

PREFIX_TOLERANCE = 1e-4
"""Largest relative difference between logits with the first tokens from a cache and without: only rounding differs."""


CAUSAL = 1e-6
"""The same with another last token: a causal model computes the very same, whatever it computes in."""


@dataclass(frozen=True)
class Ways:
    """How the rows of a control set are read; `Reading.readout` says what is read of them."""

    layout: Layout

    at_once: int
    """Prompts of a micro-batch."""

    fallbacks: tuple[str, ...]
    """Which of the short ways the model does not allow, and why."""


def find_ways(reading: Reading, control: ControlSet, micro_batch: int, prefix: int, *, alone: bool) -> Ways:
    """Find the shortest way to read a control set that agrees with the model's own logits of each prompt alone.

    Args:
        reading: how the model is read; its readout is set.
        control: the prompts.
        micro_batch: how many are read at once, if that makes no difference.
        prefix: the tokens that are run once for all, likewise.
        alone: whether prompts may be read alone, for comparison.

    Raises:
        ValueError: the model is not causal.
    """
    layout = Layout.of(control, micro_batch)
    shortest = layout.batches[-1]
    truth = reading.rows(shortest, readout="full")
    check_causality(reading, control, shortest, truth)
    shortcuts = Shortcuts(reading, control)
    found = [reading.find_readout(shortest, truth)]
    apart = shortcuts.beside_others(layout) if alone else None
    if apart is not None:
        found.append(f"{apart}: each is read alone")
        micro_batch = 1
        layout = Layout.of(control, micro_batch)
    if prefix:
        cut = Layout.of(control, micro_batch, prefix)
        why = shortcuts.behind(cut)
        found.append(why and f"the {prefix} shared tokens run in every prompt: {why}")
        layout = cut if why is None else layout
    return Ways(layout, micro_batch, tuple(why for why in found if why is not None))


class Shortcuts:
    """Compares short ways with the model's own logits of each prompt alone, one batch at a time.

    Compare while the trained weights are moved away from where they begin:
    adapters that are still 0 would agree with anything.

    Args:
        reading: how the model is read.
        control: the prompts that are compared.
    """

    def __init__(self, reading: Reading, control: ControlSet) -> None:
        self._reading, self._control = reading, control
        self._alone = Layout.of(control, 1).batches

    def beside_others(self, layout: Layout) -> str | None:
        """Compare prompts beside others of their batch.

        Returns:
            Why each has to be read alone; None if they agree.
        """
        if all(len(batch.ids) == 1 for batch in layout.batches):
            return None
        return self._compare(layout, lambda batch: self._best(batch), None, "beside other prompts the model has others")

    def behind(self, layout: Layout) -> str | None:
        """Compare prompts whose first tokens come from the model's cache.

        Returns:
            Why the cache is of no use; None if it is.
        """
        if self._reading.sharded:
            return "under FSDP2 every forward has to be made by all processes"
        if not self._reading.takes_past:
            return "the model takes no past_key_values"
        try:
            past = self._reading.past(layout.prefix)  # that a forward writes into it shows at the second batch
            return self._compare(
                layout,
                lambda batch: self._best(batch, past),
                PREFIX_TOLERANCE,
                "with its prefix from the cache the model has other logits",
            )
        except Exception as error:
            return f"the model's cache cannot be used ({type(error).__name__}: {error})"

    def _best(self, batch: Batch, past: object = None) -> Tensor:
        return self._reading.rows(batch, past, readout="full" if self._reading.readout == "full" else "rows")

    def _compare(
        self, layout: Layout, read: Callable[[Batch], Tensor], tolerance: float | None, why: str
    ) -> str | None:
        options = {} if tolerance is None else {"tolerance": tolerance}
        for batch, truth in zip(layout.batches, self._truths(layout.batches), strict=True):
            if not agree(read(batch), truth, **options):
                return why
        return None

    def _truths(self, batches: Iterable[Batch]) -> Iterator[Tensor]:
        """The rows of each batch, from every prompt alone, in one order."""
        alone = iter(self._alone)
        for batch in batches:
            yield torch.cat([self._reading.rows(next(alone), readout="full") for _ in batch.ids])


def check_causality(reading: Reading, control: ControlSet, batch: Batch, truth: Tensor) -> None:
    """Refuse a model whose logits depend on later tokens: a masked language model, an encoder.

    Args:
        reading: how it is read.
        control: whose prompts these are.
        batch: some of them, without a prefix that was cut off.
        truth: the logits of their response rows.

    Raises:
        ValueError: the logits of earlier rows change with the last token of a text.
    """
    known = sorted({i for ids in (*control.prompts, *control.responses) for i in ids.tolist()})
    a, b = known[0], known[-1] if len(known) > 1 else max(known[0] - 1, 0)
    ids, last = batch.ids.clone(), batch.mask.sum(1, keepdim=True) - 1
    ids.scatter_(1, last, torch.where(ids.gather(1, last) == a, b, a))
    if looks_ahead(reading, replace(batch, ids=ids), batch, truth):
        raise ValueError(
            f"{type(reading.model).__name__} is no causal language model: its logits at a token depend on later tokens "
            "(a masked language model, an encoder?). A control set of prompts and responses needs a causal one; for "
            "others give the batches that they take, ControlSet.from_batches"
        )


def looks_ahead(reading: Reading, changed: Batch, batch: Batch, truth: Tensor) -> bool:
    """Whether a batch has other logits than ``truth`` where later tokens are others, and none where they are not."""
    there, again = (reading.rows(each, readout="full") for each in (changed, batch))
    return difference(again, truth) == 0 and difference(there, truth) > CAUSAL  # random numbers are another fault
