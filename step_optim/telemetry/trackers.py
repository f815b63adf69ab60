"""Experiment trackers: how each of them is given a record, so that none is lost."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

from step_optim.telemetry.record import StepRecord

Sink = Callable[[StepRecord], None]


def tracker_sink(log: Any) -> Sink | None:
    """Return what gives a tracker its records: flat, with a step where it takes one. None if this is no tracker.

    Trackers are objects with ``log(dict, step=...)`` or ``log(dict)``, loggers
    with ``log_metrics(dict, step)``, and these methods themselves where they
    are known to be a tracker's.

    Raises:
        TypeError: a ``log()`` that needs other arguments.
    """
    if isinstance(log, type):
        return None
    owner = _owner(log)
    decorated = owner is not None and getattr(owner, "log", None) == log  # a decorator may have taken its name
    name = "log" if decorated else getattr(log, "__name__", "").rpartition(".")[2]
    if name == "log" and (_counts_steps(owner) or _is_a(owner, "accelerate", "Accelerator")):
        log = owner
    if _counts_steps(log):
        return _WandB(lambda: getattr(log, "run", None) or log if isinstance(log, ModuleType) else log)
    if _is_a(log, "accelerate", "Accelerator"):
        return _accelerator_sink(log)
    if name == "log" and _is_a(owner, "transformers", "Trainer"):
        return _with_step(log, log, _everything)
    if name in ("log_metrics", "log_dict") and any(_is_a(owner, package, None) for package in _LIGHTNING):
        return _with_step(log, log, _numbers)
    if callable(getattr(log, "log", None)):
        return _with_step(log, log.log, _everything)
    if callable(getattr(log, "log_metrics", None)):
        return _with_step(log, log.log_metrics, _numbers)
    return None


def takes(function: Callable[..., Any], *arguments: Any, **named: Any) -> bool:
    """Whether a function can be called so, as far as its signature says."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # written in C, it says nothing
        return True
    try:
        signature.bind(*arguments, **named)
    except TypeError:
        return False
    return True


_written: dict[int, tuple[Any, int | None]] = {}
"""Runs that count their own steps, by id, and where the last record is in each: several optimizers may log to one."""


class _WandB:
    """Logs to a run that counts its own steps, and drops what is logged with a smaller one.

    So a record goes to the step at which the run is: beside what others have
    logged there, or one further if that already has a record of ours. Its own
    step index is the x-axis.
    """

    def __init__(self, find: Callable[[], Any]) -> None:
        self._find = find  # the run may begin after the optimizer was made

    def __call__(self, record: StepRecord) -> None:
        run = self._find()
        if id(run) not in _written:
            run.define_metric("step_optim/*", step_metric="step_optim/step")
        _, last = _written.get(id(run), (run, None))
        step = _current_step(run)
        if step is None:
            run.log(record.flat())
        else:
            step += step == last
            run.log(record.flat(), step=step)
        _written[id(run)] = run, step  # holds the run, so that its id is no other's


def _current_step(run: Any) -> int | None:
    """The step of the next log(); None if the run does not say (before it begins, offline stand-ins, shared mode)."""
    try:
        step = run.step
    except Exception:
        return None
    return step if isinstance(step, int) else None


def _accelerator_sink(accelerator: Any) -> Sink:
    """Give each of an Accelerator's trackers a step, but for W&B's."""
    wandb = _WandB(lambda: accelerator.get_tracker("wandb", unwrap=True))

    def write(record: StepRecord) -> None:
        if not accelerator.is_main_process:
            return
        if not accelerator.trackers:
            warnings.warn(
                "log=accelerator has no trackers, so no record is kept; call accelerator.init_trackers(...), "
                "or log to a path",
                stacklevel=2,
            )
        for tracker in accelerator.trackers:
            if tracker.name == "wandb":
                wandb(record)
            else:
                tracker.log(record.flat(), step=record.step)

    return write


def _with_step(log: Any, write: Callable[..., Any], values: Callable[[StepRecord], dict[str, Any]]) -> Sink:
    """Write with ``step=`` where that is taken, else without."""
    if takes(write, {}, step=0):
        return lambda record: write(values(record), step=record.step)
    if takes(write, {}):
        return lambda record: write(values(record))
    raise TypeError(
        f"log={log!r:.200}: its {getattr(write, '__name__', 'log')}() cannot be called with (dict, step=...) nor with "
        "(dict); give a function that can, such as lambda record, step: ..., or a path"
    )


def _everything(record: StepRecord) -> dict[str, Any]:
    return record.flat()


def _numbers(record: StepRecord) -> dict[str, Any]:
    """What loggers of numbers bear: flags as 0 and 1, no texts."""
    return {name: float(value) for name, value in record.flat().items() if isinstance(value, (int, float))}


_LIGHTNING = ("lightning", "pytorch_lightning", "lightning_fabric")


def _owner(function: Any) -> Any:
    """The object of a bound method; the package W&B for ``wandb.log``, which is no method before ``wandb.init``."""
    package = (getattr(function, "__module__", None) or "").partition(".")[0]
    if package == "wandb" and not hasattr(function, "__self__"):
        return sys.modules.get("wandb")
    return getattr(function, "__self__", None)


def _counts_steps(thing: Any) -> bool:
    """Whether this is W&B's run or module, or works like them: their steps are their own, others are metrics."""
    return callable(getattr(thing, "define_metric", None)) and callable(getattr(thing, "log", None))


def _is_a(thing: Any, package: str, name: str | None) -> bool:
    """Whether this is an object of a class (any, if no name is given) of a package that may not be installed."""
    return any(
        kind.__module__.partition(".")[0] == package and name in (None, kind.__name__) for kind in type(thing).__mro__
    )
