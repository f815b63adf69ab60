"""STEP in the Hugging Face Trainer, and in those that derive from it (TRL's): one callback."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from step_optim.audit.closure import KLClosure
from step_optim.budget import Bound, Budget
from step_optim.hosts.columns import Recent, step_optimizer
from step_optim.hosts.model_card import add_section, section
from step_optim.optimizer import STEPOptimizer


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
    come later see them: the progress bar always; the trackers of
    ``report_to`` if it was attached, for the Trainer places them before
    callbacks that are passed. ``log=`` gets every step, whatever
    ``logging_steps`` is.

    Args:
        kl: a KL closure, or a function of the model that makes one. None if the Trainer has a `STEPOptimizer` already,
            and only its figures are wanted.
        budget: as of `STEPOptimizer`; both or neither of these two.
        **options: others of `STEPOptimizer`'s: controller, log, ...

    Raises:
        TypeError: one of ``kl`` and ``budget`` without the other; an option that `STEPOptimizer` does not have.
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
        self._kl, self._options = kl, {"budget": budget, **options}
        self._optimizer: STEPOptimizer | None = None
        self._recent = Recent()
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
        """
        if isinstance(optimizer, TrainingArguments):
            optimizer, found = Trainer.get_optimizer_cls_and_kwargs(optimizer)
            kwargs = found | dict(kwargs or {})
        if isinstance(optimizer, type) and issubclass(optimizer, Optimizer):
            return _class_around(optimizer, self._wrapped), {**(kwargs or {}), **more}
        return _factory_around(optimizer, self._wrapped), {**(kwargs or {}), **more}

    def _wrapped(self, optimizer: Optimizer) -> STEPOptimizer:
        return STEPOptimizer(optimizer, **self._options)

    def attach(self, trainer: Trainer) -> STEPCallback:
        """Give a trainer that has not trained yet the trust region, the columns, and the section of its model card.

        Returns:
            The callback itself.

        Raises:
            RuntimeError: nothing to attach: neither ``kl`` was given nor is the Trainer's optimizer a `STEPOptimizer`.
        """
        if trainer.optimizer is not None:
            if step_optimizer(trainer.optimizer) is None:
                self._require_kl()
                trainer.optimizer = self._wrapped(trainer.optimizer)
        elif not _is_ours(trainer.optimizer_cls_and_kwargs):
            self._require_kl()
            chosen = trainer.optimizer_cls_and_kwargs
            model: Any = trainer.model
            chosen = chosen or trainer.get_optimizer_cls_and_kwargs(trainer.args, model)
            trainer.optimizer_cls_and_kwargs = self.around(*chosen)
        callbacks = trainer.callback_handler.callbacks
        callbacks[:] = [self, *(callback for callback in callbacks if callback is not self)]
        self._add_to_cards_of(trainer)
        return self

    def _require_kl(self) -> None:
        if self._kl is None:
            raise RuntimeError(
                "the Trainer has no STEPOptimizer, and STEPCallback() alone makes none; give it kl= and budget="
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
        self._optimizer = optimizer
        if self._kl is not None and optimizer.kl is None:
            optimizer.bind(self._kl if isinstance(self._kl, KLClosure) else self._kl(kwargs["model"]))
        self._recent.begin(optimizer)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take the record of the step."""
        if self._optimizer is not None:
            self._recent.see(self._optimizer)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the columns to the row, which is in the history already."""
        logs: dict[str, Any] | None = kwargs.get("logs")
        if self._optimizer is None or logs is None or any(name.startswith("eval_") for name in logs):
            return
        row = self._recent.take(self._optimizer)
        logs.update(row)
        if state.log_history:
            state.log_history[-1].update(row)

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
    return type(inner.__name__, (_Around,), names)


class _Around(Optimizer):
    """What the classes of `_class_around` have in common."""


def _factory_around(factory: Any, wrap: _Wrap) -> Callable[[], Callable[..., STEPOptimizer]]:
    """Return the same around a factory: ``factory()(model, **kwargs)`` makes the optimizer."""

    class Factory(_AroundFactory):
        def __call__(self, model: Any, **kwargs: Any) -> STEPOptimizer:
            return wrap(factory()(model, **kwargs))

    return Factory


class _AroundFactory:
    """What the factories of `_factory_around` have in common."""


def _is_ours(chosen: tuple[Any, Any] | None) -> bool:
    return chosen is not None and isinstance(chosen[0], type) and issubclass(chosen[0], (_Around, _AroundFactory))
