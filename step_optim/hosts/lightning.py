"""STEP in Lightning: a callback that logs its figures."""

from __future__ import annotations

from collections.abc import Iterator
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
        ValueError: a name that is no figure.

    >>> STEPCallback(progress_bar=("max_accepted_kl", "trigger_rate")).progress_bar
    ('max_accepted_kl', 'trigger_rate')
    """

    def __init__(self, progress_bar: tuple[str, ...] = ("max_accepted_kl", "trigger_rate")) -> None:
        unknown = [name for name in progress_bar if name not in (*OF_THE_STEPS, *OF_THE_RUN)]
        if unknown:
            raise ValueError(
                f"progress_bar={progress_bar!r}: {unknown[0]!r} is no figure; choose from {OF_THE_STEPS + OF_THE_RUN}"
            )
        self.progress_bar = tuple(progress_bar)
        self._recent: dict[int, Recent] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the first row.

        Raises:
            RuntimeError: no optimizer is a `STEPOptimizer`.
        """
        self._recent, every = {}, getattr(trainer, "log_every_n_steps", 0)
        for place, optimizer in _optimizers(trainer):
            self._recent[place] = Recent(most=every or 1)
            self._recent[place].begin(optimizer)
        if not self._recent:
            raise RuntimeError(
                "STEPCallback found no STEPOptimizer among the Trainer's optimizers; return one from "
                "configure_optimizers()"
            )

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Log the latest steps."""
        for place, optimizer in _optimizers(trainer):
            self._recent[place].see(optimizer)
            for name, value in self._recent[place].row(optimizer).items():
                shown = name.removeprefix("step_optim/") in self.progress_bar
                ending = f"/{place}" if len(self._recent) > 1 else ""
                pl_module.log(name + ending, value, prog_bar=shown, on_step=True, on_epoch=False, rank_zero_only=True)


def _optimizers(trainer: Trainer) -> Iterator[tuple[int, STEPOptimizer]]:
    for place, optimizer in enumerate(trainer.optimizers):
        found = step_optimizer(optimizer)
        if found is not None:
            yield place, found
