"""Experiment trackers: which one ``log=`` is."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Collection
from types import ModuleType
from typing import Any

from step_optim.telemetry.alerts import KINDS, Alerts, check_kinds
from step_optim.telemetry.record import ROOT, StepRecord
from step_optim.telemetry.sinks import Accelerate, MLflow, Sink, TensorBoard, Trackio, WandB, numbers


class Tracker:
    """A tracker for ``log=``, what it is to send alerts about, and a name for the optimizer.

    A tracker that is given as it is sends all alerts that it can: W&B and
    trackio alerts, TensorBoard texts. See `Alerts` for when. Two optimizers
    that log to one tracker need a name each.

    Args:
        tracker: see `tracker_sink`.
        alerts: of ``("trigger", "stall", "cap", "error")``.
        name: all names begin with ``step_optim/<name>/``.

    Raises:
        TypeError: no tracker; alerts that are no tuple; a name that is no text.
        ValueError: an unknown kind of alert; kinds that were chosen for a tracker without alerts; an empty name.

    >>> Tracker(print)
    Traceback (most recent call last):
        ...
    TypeError: Tracker(<built-in function print>) is no tracker; paths and functions go into log= as they are
    """

    def __init__(self, tracker: Any, *, alerts: Collection[str] = KINDS, name: str | None = None) -> None:
        self.tracker, self.alerts = tracker, check_kinds(alerts)
        if name is not None and not isinstance(name, str):
            raise TypeError(f"name={name!r} is no text; give one such as 'actor'")
        if name is not None and not name.strip("/ "):
            raise ValueError(f"name={name!r} is empty; give one such as 'actor', or None")
        self.root = ROOT if name is None else f"{ROOT}/{name}"
        sink = _plain_sink(tracker, self.root)
        if sink is None:
            raise TypeError(f"Tracker({tracker!r:.200}) is no tracker; paths and functions go into log= as they are")
        if self.alerts and self.alerts != frozenset(KINDS) and not hasattr(sink, "alert"):
            raise ValueError(f"alerts={alerts!r}: {type(tracker).__name__} has no alerts to send; leave alerts out")


def tracker_sink(log: Any) -> Sink | None:
    """Return what gives a tracker its records: flat, with a step where it takes one. None if this is no tracker.

    Trackers are W&B and trackio, MLflow, a ``SummaryWriter``, an Accelerator
    and a Trainer; other objects with ``log(dict, step=...)`` or ``log(dict)``;
    loggers with ``log_metrics(dict, step)``; these functions and methods
    themselves where they are known to be a tracker's; and a `Tracker` around
    any of them.

    Raises:
        TypeError: a ``log()`` that needs other arguments.
    """
    named = isinstance(log, Tracker)
    kinds, sink = (log.alerts, _plain_sink(log.tracker, log.root)) if named else (KINDS, _plain_sink(log))
    if sink is None or not hasattr(sink, "alert") or not kinds:
        return sink
    tell, write = Alerts(sink.alert, kinds), sink

    def both(record: StepRecord) -> None:
        write(record)
        tell(record)

    return both


def _plain_sink(log: Any, root: str = ROOT) -> Sink | None:
    """What gives a tracker its records, and may have an ``alert()``."""
    if isinstance(log, type):
        return None
    owner = _owner(log)
    decorated = owner is not None and getattr(owner, "log", None) == log  # a decorator may have taken its name
    name = "log" if decorated else getattr(log, "__name__", "").rpartition(".")[2]
    if name == "log" and (_counts_steps(owner) or _is_trackio(owner) or _is_a(owner, "accelerate", "Accelerator")):
        log = owner
    if _counts_steps(log):
        return WandB(lambda: getattr(log, "run", None) or log if isinstance(log, ModuleType) else log, root)
    if _is_trackio(log):
        return Trackio(log, root)
    if _is_a(log, "accelerate", "Accelerator"):
        return Accelerate(log, root)
    if callable(getattr(log, "add_scalar", None)) and callable(getattr(log, "add_text", None)):
        return TensorBoard(log, root)
    if _is_mlflow(log) or (name == "log_metrics" and _is_mlflow(owner)):
        return MLflow((log if owner is None else owner).log_metrics, root)

    def everything(record: StepRecord) -> dict[str, Any]:
        return record.flat(root)

    def figures(record: StepRecord) -> dict[str, Any]:
        return numbers(record, root)

    if name == "log" and _is_a(owner, "transformers", "Trainer"):
        return _with_step(log, log, everything)
    if name in ("log_metrics", "log_dict") and any(_is_a(owner, package, None) for package in _LIGHTNING):
        return _with_step(log, log, figures)
    if callable(getattr(log, "log", None)):
        return _with_step(log, log.log, everything)
    if callable(getattr(log, "log_metrics", None)):
        return _with_step(log, log.log_metrics, figures)
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


_LIGHTNING = ("lightning", "pytorch_lightning", "lightning_fabric")

_MODULES = ("wandb", "trackio", "mlflow")
"""Packages whose functions log to the run in progress."""


def _owner(function: Any) -> Any:
    """The object of a bound method; of a plain function of a tracker, its package."""
    package = (getattr(function, "__module__", None) or "").partition(".")[0]
    if package in _MODULES and callable(function) and not hasattr(function, "__self__"):
        return sys.modules.get(package)
    return getattr(function, "__self__", None)


def _counts_steps(thing: Any) -> bool:
    """Whether this is W&B's run or module, or works like them: their steps are their own, others are metrics."""
    return callable(getattr(thing, "define_metric", None)) and callable(getattr(thing, "log", None))


def _is_trackio(thing: Any) -> bool:
    return getattr(thing, "__name__", None) == "trackio" or _is_a(thing, "trackio", "Run")


def _is_mlflow(thing: Any) -> bool:
    return isinstance(thing, ModuleType) and thing.__name__ == "mlflow"


def _is_a(thing: Any, package: str, name: str | None) -> bool:
    """Whether this is an object of a class (any, if no name is given) of a package that may not be installed."""
    return any(
        kind.__module__.partition(".")[0] == package and name in (None, kind.__name__) for kind in type(thing).__mro__
    )
