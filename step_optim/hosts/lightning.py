"""STEP in Lightning: a callback that logs its figures."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from step_optim.hosts.columns import OF_THE_RUN, OF_THE_STEPS, Recent, step_optimizer
from step_optim.optimizer import STEPOptimizer


class STEPCallback(Callback):
    """Logs the figures of the module's `STEPOptimizer`s, as ``self.log_dict`` of the module would.

    So they are in the progress bar, in ``trainer.callback_metrics`` for
    EarlyStopping and ModelCheckpoint, and in every logger, with Lightning's
    own steps. They are of the latest ``log_every_n_steps`` steps; see
    `columns`. ``STEPOptimizer(log=logger)`` gets every step. With several
    optimizers the names end in ``/0``, ``/1``, ...

    Args:
        progress_bar: the figures shown there, by their names after ``step_optim/``.

    Raises:
        TypeError: no tuple.
        ValueError: a name that is no figure.

    >>> STEPCallback(progress_bar=("max_accepted_kl", "trigger_rate")).progress_bar
    ('max_accepted_kl', 'trigger_rate')
    """

    def __init__(self, progress_bar: Collection[str] = ("max_accepted_kl", "trigger_rate")) -> None:
        if isinstance(progress_bar, str) or not isinstance(progress_bar, Collection):
            raise TypeError(f"progress_bar={progress_bar!r} is no tuple; give names, or () for none")
        unknown = [name for name in progress_bar if name not in (*OF_THE_STEPS, *OF_THE_RUN)]
        if unknown:
            raise ValueError(
                f"progress_bar={progress_bar!r}: {unknown[0]!r} is no figure; choose from {OF_THE_STEPS + OF_THE_RUN}"
            )
        self.progress_bar = tuple(progress_bar)
        self._recent: dict[int, Recent] = {}
        self._logged: set[str] = set()
        """Names that have been logged: a figure that is not measured any more is NaN."""
        self._hooks: list[Any] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the first row.

        Raises:
            RuntimeError: no optimizer is a `STEPOptimizer`.
        """
        self._recent, self._logged = {}, set()
        for place, optimizer in _optimizers(trainer):
            self._recent_of(place, optimizer, trainer)
        if not self._recent:
            raise RuntimeError(
                "STEPCallback found no STEPOptimizer among the Trainer's optimizers; return one from "
                "configure_optimizers()"
            )

    def _recent_of(self, place: int, optimizer: STEPOptimizer, trainer: Trainer) -> Recent:
        """The latest steps of an optimizer; a batch may make several."""
        if place not in self._recent:
            recent = self._recent[place] = Recent(most=getattr(trainer, "log_every_n_steps", 0) or 1)
            recent.begin(optimizer)
            self._hooks.append(optimizer.register_step_post_hook(lambda *_: recent.see(optimizer)))
        return self._recent[place]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let go of the optimizers."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Log the latest steps."""
        for place, optimizer in _optimizers(trainer):
            recent = self._recent_of(place, optimizer, trainer)
            recent.see(optimizer)  # the record of a window comes after its steps
            ending = f"/{place}" if len(self._recent) > 1 else ""
            row = {name + ending: value for name, value in recent.row(optimizer).items()}
            mine = [name for name in self._logged if name.endswith(ending)] if row else []
            for name, value in (dict.fromkeys(mine, math.nan) | row).items():
                self._logged.add(name)
                shown = name.removeprefix("step_optim/").removesuffix(ending) in self.progress_bar
                pl_module.log(name, value, prog_bar=shown, on_step=True, on_epoch=False, rank_zero_only=True)


def _optimizers(trainer: Trainer) -> Iterator[tuple[int, STEPOptimizer]]:
    for place, optimizer in enumerate(trainer.optimizers):
        found = step_optimizer(optimizer)
        if found is not None:
            yield place, found
