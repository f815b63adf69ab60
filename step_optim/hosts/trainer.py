"""STEP in the Hugging Face Trainer, and in those that derive from it (TRL's): one callback."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from step_optim.audit.closure import KLClosure
from step_optim.budget import Bound, Budget
from step_optim.hosts.columns import Recent, step_optimizer
from step_optim.hosts.model_card import add_section, section
from step_optim.optimizer import STEPOptimizer
from step_optim.telemetry.trackers import takes

MOST = 10_000
"""Steps that are kept for a row; a run may log none."""

SHOWN = {"Largest KL": "max_accepted_kl", "Over budget": "trigger_rate", "Drift": "reference_drift"}
"""Columns of a notebook's table."""


class STEPCallback(TrainerCallback):
    """Gives a Trainer's optimizer a trust region, and the Trainer's logs its figures.

    Either attach it to a trainer that is ready to train::

        trainer = GRPOTrainer(..., peft_config=LoraConfig(...))
        STEPCallback(kl=lambda model: TokenKL(model, control), budget=0.03).attach(trainer)
        trainer.train()

    or pass both of its parts when the trainer is made::

        step = STEPCallback(kl=lambda model: TokenKL(model, control), budget=0.03)
        trainer = Trainer(..., callbacks=[step], optimizer_cls_and_kwargs=step.around(torch.optim.AdamW, lr=1e-4))

    The model is audited as it is when training begins: with the LoRA that the
    trainer has added. Each row of the training log gets columns
    ``step_optim/...`` of the steps since the last one; see `columns`. They are
    in ``state.log_history`` and ``trainer_state.json``, and callbacks that
    come later see them: the progress bar always; if it was attached, the
    trackers of ``report_to`` too, and the table in a notebook (the Trainer
    places these before callbacks that are passed). ``log=`` gets every step,
    whatever ``logging_steps`` is.

    Args:
        kl: a KL closure, or a function of the model that makes one. None if the Trainer has a `STEPOptimizer` already,
            and only its figures are wanted.
        budget: as of `STEPOptimizer`; both or neither of these two.
        **options: others of `STEPOptimizer`'s: controller, log, ...

    Raises:
        TypeError: one of ``kl`` and ``budget`` without the other; a ``kl`` that takes no model; an option that
            `STEPOptimizer` does not have.
        ValueError: an option that `STEPOptimizer` refuses.
    """

    def __init__(
        self,
        kl: KLClosure | Callable[[Any], KLClosure] | None = None,
        *,
        budget: Budget | Bound | None = None,
        **options: Any,
    ) -> None:
        if (kl is None) != (budget is None) or (kl is None and options):
            raise TypeError(
                f"STEPCallback(kl={kl!r:.60}, budget={budget!r:.60}): give both, or neither and no option for the "
                "figures of a STEPOptimizer that the Trainer has already"
            )
        if not (kl is None or isinstance(kl, KLClosure) or (callable(kl) and takes(kl, None))):
            raise TypeError(
                f"kl={kl!r:.200} is neither a KL closure nor a function of the model; give lambda model: "
                "TokenKL(model, control), say"
            )
        self._kl, self._options = kl, {"budget": budget, **options}
        self._made: STEPOptimizer | None = None
        """The optimizer that this callback has made."""
        self._optimizer: STEPOptimizer | None = None
        """The one that is trained with."""
        self._recent = Recent(most=MOST)
        self._row: dict[str, float] = {}
        """The latest row."""
        self._handler: CallbackHandler | None = None
        """Of the trainer that it is attached to."""
        self._table: Any = None
        """Of a notebook, if it gets the columns."""
        if kl is not None:
            self._check_options()

    def _check_options(self) -> None:
        """Refuse now what `STEPOptimizer` would refuse when the Trainer makes its optimizer."""
        options = self._options | {"process_group": None, "log": None, "param_like": ()}
        STEPOptimizer(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]), **options)

    # -- making the optimizer -----------------------------------------------------------------------------------------

    def around(
        self, optimizer: Any, kwargs: Mapping[str, Any] | None = None, /, **more: Any
    ) -> tuple[Any, dict[str, Any]]:
        """Return what ``Trainer(optimizer_cls_and_kwargs=...)`` takes.

        Args:
            optimizer: an optimizer class; or TrainingArguments, for the optimizer that they name.
            kwargs: its arguments.
            **more: its arguments, too.

        >>> import torch
        >>> step = STEPCallback(kl=lambda model: TokenKL(model, control), budget=0.03)
        >>> step.around(torch.optim.AdamW, lr=1e-4)
        (<class 'torch.optim.adamw.AdamW'>, {'lr': 0.0001})

        Raises:
            TypeError: neither a class of optimizers nor TrainingArguments.
        """
        if isinstance(optimizer, TrainingArguments):
            optimizer, found = Trainer.get_optimizer_cls_and_kwargs(optimizer)
            kwargs = found | dict(kwargs or {})
        if isinstance(optimizer, type) and issubclass(optimizer, Optimizer):
            return _class_around(optimizer, self._wrapped), {**(kwargs or {}), **more}
        if isinstance(optimizer, (str, Optimizer)) or not callable(optimizer):
            raise TypeError(
                f"around({optimizer!r:.100}) needs a class of optimizers, torch.optim.AdamW say, or TrainingArguments"
            )
        return _factory_around(optimizer, self._wrapped), {**(kwargs or {}), **more}

    def _wrapped(self, optimizer: Optimizer) -> STEPOptimizer:
        if self._kl is None:
            raise RuntimeError(
                "the Trainer has no STEPOptimizer, and STEPCallback() alone makes none; give it kl= and budget="
            )
        self._made = STEPOptimizer(optimizer, **self._options)
        return self._made

    def attach(self, trainer: Trainer) -> STEPCallback:
        """Give a trainer the trust region, the columns, and the section of its model card.

        The optimizer is the one that the trainer makes when training begins,
        or has made already.

        Returns:
            The callback itself.

        Raises:
            RuntimeError: the trainer has a trust region already, and this one would be another.
        """
        if trainer.optimizer is not None:
            trainer.optimizer = self._around_made(trainer.optimizer)
        create = trainer.create_optimizer

        def create_optimizer(*args: Any, **kwargs: Any) -> Any:
            trainer.optimizer = self._around_made(create(*args, **kwargs))
            return trainer.optimizer

        trainer.create_optimizer = create_optimizer  # type: ignore[method-assign]
        callbacks = trainer.callback_handler.callbacks
        callbacks[:] = [self, *(callback for callback in callbacks if callback is not self)]
        self._handler = trainer.callback_handler
        self._add_to_cards_of(trainer)
        return self

    def _around_made(self, optimizer: Any) -> Any:
        """Wrap an optimizer, unless a `STEPOptimizer` is in it: ours, or anybody's if only its figures are wanted."""
        found = step_optimizer(optimizer)
        if found is None:
            return self._wrapped(optimizer)
        self._check_made(found)
        return optimizer

    def _check_made(self, optimizer: STEPOptimizer) -> None:
        if self._kl is not None and optimizer is not self._made:
            raise RuntimeError(
                f"the Trainer's optimizer is a STEPOptimizer already, with {optimizer.budget!r}: kl=, budget= and all "
                "else of this STEPCallback would be ignored. Use STEPCallback() for its figures alone; to change it, "
                "optimizer.bind(kl) and optimizer.budget = ..."
            )

    # -- events -------------------------------------------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Bind the KL closure to the model that is trained."""
        optimizer = step_optimizer(kwargs["optimizer"])
        if optimizer is None:
            raise RuntimeError(
                f"STEPCallback found no STEPOptimizer in the Trainer's {type(kwargs['optimizer']).__name__}; call "
                "attach(trainer), or pass optimizer_cls_and_kwargs=callback.around(torch.optim.AdamW, lr=...)"
            )
        self._check_made(optimizer)
        self._optimizer = optimizer
        if self._kl is not None and optimizer.kl is None:
            optimizer.bind(self._kl if isinstance(self._kl, KLClosure) else self._kl(kwargs["model"]))
        self._recent.begin(optimizer)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take the record of the step."""
        if self._optimizer is not None:
            self._recent.see(self._optimizer)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the columns to a row of the training log, which is in the history already."""
        logs: dict[str, Any] | None = kwargs.get("logs")
        if self._optimizer is None or logs is None or logs.keys().isdisjoint(("loss", "train_runtime")):
            return
        row = self._recent.take(self._optimizer)
        self._row = row or self._row
        logs.update(row)
        if state.log_history:
            state.log_history[-1].update(row)
        self._show_in_notebooks()

    def _show_in_notebooks(self) -> None:
        """Have a notebook's table get the columns: of the Trainer's rows it shows the loss alone."""
        for callback in [] if self._handler is None else self._handler.callbacks:
            table = getattr(callback, "training_tracker", None)
            if table is not None and table is not self._table:
                self._table, write = table, table.write_line
                table.write_line = lambda values, write=write: write(values | self._shown())

    def _shown(self) -> dict[str, float]:
        named = {name: self._row.get(f"step_optim/{figure}") for name, figure in SHOWN.items()}
        return {name: value for name, value in named.items() if value is not None}

    # -- the model card -----------------------------------------------------------------------------------------------

    def card(self) -> str:
        """Return a section for the model card, in Markdown; see `model_card.section`.

        Raises:
            RuntimeError: training has not begun.
        """
        if self._optimizer is None:
            raise RuntimeError("there is no run yet that a model card could tell of; train first")
        return section(self._optimizer)

    def add_to_card(self, path: str | Path) -> None:
        """Put that section into a model card, README.md; an older one is replaced."""
        add_section(path, self.card())

    def _add_to_cards_of(self, trainer: Trainer) -> None:
        """Have every card that the trainer writes from now on get the section."""
        write = trainer.create_model_card

        def create_model_card(*args: Any, **kwargs: Any) -> None:
            write(*args, **kwargs)
            card = Path(str(trainer.args.output_dir)) / "README.md"
            if self._optimizer is not None and trainer.is_world_process_zero() and card.exists():
                self.add_to_card(card)

        trainer.create_model_card = create_model_card  # type: ignore[method-assign]


_Wrap = Callable[[Optimizer], STEPOptimizer]


def _class_around(inner: type[Optimizer], wrap: _Wrap) -> type[Optimizer]:
    """Return a class whose objects are `STEPOptimizer`s around those of another one.

    Trainers ask whether it is a class of optimizers, and what its name is:
    bitsandbytes' get embeddings of 32 bits.
    """

    def make(cls: type, params: Any, *args: Any, **kwargs: Any) -> STEPOptimizer:
        return wrap(inner(params, *args, **kwargs))

    names = {"__new__": make, "__module__": inner.__module__, "__qualname__": inner.__qualname__}
    return type(inner.__name__, (Optimizer,), names)


def _factory_around(factory: Any, wrap: _Wrap) -> Callable[[], Callable[..., STEPOptimizer]]:
    """Return the same around a factory: ``factory()(model, **kwargs)`` makes the optimizer."""

    class Factory:
        def __call__(self, model: Any, **kwargs: Any) -> STEPOptimizer:
            return wrap(factory()(model, **kwargs))

    return Factory
