"""How each kind of experiment tracker is given a record, on a step axis of its own, and told of what is unusual."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from step_optim.controllers.base import Action
from step_optim.telemetry.alerts import Alert
from step_optim.telemetry.record import StepRecord

Sink = Callable[[StepRecord], None]

_BUDGET = "step_optim/budget"

STEP = "step_optim/step"
"""The name of the step index in a flat record: the x-axis."""


def everything(record: StepRecord) -> dict[str, Any]:
    """What trackers of figures and texts are given."""
    return record.flat()


def numbers(record: StepRecord) -> dict[str, float]:
    """What trackers of figures are given: flags as 0 and 1, whether the step was rejected, no texts, finite budgets."""
    flat = record.flat() | {"step_optim/rejected": record.action is Action.REJECT}
    figures = {name: float(value) for name, value in flat.items() if isinstance(value, (int, float))}
    return {name: value for name, value in figures.items() if value != math.inf or not name.startswith(_BUDGET)}


_written: dict[int, tuple[Any, int | None]] = {}
"""Runs that count their own steps, by id, and where the last record is in each: several optimizers may log to one."""


class WandB:
    """Logs to a run that counts its own steps, and drops what is logged with a smaller one.

    So a record goes to the step at which the run is: beside what others have
    logged there, or one further if that already has a record of ours. Its own
    step index is the x-axis.

    Args:
        find: returns the run, which may begin after the optimizer was made.
    """

    def __init__(self, find: Callable[[], Any]) -> None:
        self._find = find

    def __call__(self, record: StepRecord) -> None:
        """Log a record."""
        run = self._find()
        if id(run) not in _written:
            run.define_metric("step_optim/*", step_metric=STEP)
        _, last = _written.get(id(run), (run, None))
        step = _current_step(run)
        if step is None:
            run.log(record.flat())
        else:
            step += step == last
            run.log(record.flat(), step=step)
        _written[id(run)] = run, step  # holds the run, so that its id is no other's

    def alert(self, alert: Alert) -> None:
        """Send an alert, by e-mail or Slack if the user has said so there."""
        send = getattr(self._find(), "alert", None)
        if send is not None:
            send(title=alert.title, text=alert.text, level=alert.level.upper())


def _current_step(run: Any) -> int | None:
    """The step of the next log(); None if the run does not say (before it begins, offline stand-ins, shared mode)."""
    try:
        step = run.step
    except Exception:
        return None
    return step if isinstance(step, int) else None


class Trackio:
    """Logs to trackio, or to one of its runs, which keep what is logged at any step."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def __call__(self, record: StepRecord) -> None:
        """Log a record."""
        self._run.log(record.flat(), step=record.step)

    def alert(self, alert: Alert) -> None:
        """Send an alert: to the terminal, the dashboard, and a webhook if there is one."""
        send = getattr(self._run, "alert", None)
        if send is not None:  # older versions have none
            from trackio import AlertLevel

            send(alert.title, alert.text, level=AlertLevel(alert.level))


class TensorBoard:
    """Writes figures as scalars of their own, and alerts as texts, through a ``SummaryWriter``."""

    def __init__(self, writer: Any) -> None:
        self._writer, self._step = writer, 0

    def __call__(self, record: StepRecord) -> None:
        """Write a record."""
        self._step = record.step
        for name, value in numbers(record).items():
            self._writer.add_scalar(name, value, global_step=record.step)
        self._writer.flush()

    def alert(self, alert: Alert) -> None:
        """Write an alert, at the step of the record before."""
        self._writer.add_text("step_optim/alerts", f"**{alert.title}.** {alert.text}", global_step=self._step)
        self._writer.flush()


MOST = 1000
"""Metrics that MLflow takes at once."""

_REFUSED = re.compile(r"[^/\w.\- :]")


class MLflow:
    """Logs figures as metrics, by names that MLflow takes.

    Args:
        log_metrics: takes a dict and ``step=``.
    """

    def __init__(self, log_metrics: Callable[..., Any]) -> None:
        self._log_metrics = log_metrics

    def __call__(self, record: StepRecord) -> None:
        """Log a record."""
        for metrics in _in_parts({allowed(name): value for name, value in numbers(record).items()}, MOST):
            self._log_metrics(metrics, step=record.step)


def allowed(name: str) -> str:
    """Spell out what MLflow does not take in a name.

    >>> allowed("step_optim/accepted/slices/why?")
    'step_optim/accepted/slices/why_x3f_'
    """
    return _REFUSED.sub(lambda character: f"_x{ord(character[0]):x}_", name)


def _in_parts(values: Mapping[str, float], most: int) -> Iterator[dict[str, float]]:
    names = list(values)
    for start in range(0, len(names), most):
        yield {name: values[name] for name in names[start : start + most]}


class Accelerate:
    """Gives a record to each of an Accelerator's trackers as that tracker likes it, in the main process."""

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        self._wandb = WandB(lambda: accelerator.get_tracker("wandb", unwrap=True))

    def __call__(self, record: StepRecord) -> None:
        """Log a record."""
        if not self._accelerator.is_main_process:
            return
        if not self._accelerator.trackers:
            warnings.warn(
                "log=accelerator has no trackers, so no record is kept; call accelerator.init_trackers(...), "
                "or log to a path",
                stacklevel=2,
            )
        for sink in self._sinks():
            sink(record)

    def alert(self, alert: Alert) -> None:
        """Send an alert through the trackers that have some."""
        if self._accelerator.is_main_process:
            for sink in self._sinks():
                if hasattr(sink, "alert"):
                    sink.alert(alert)

    def _sinks(self) -> Iterator[Any]:
        for tracker in self._accelerator.trackers:
            if tracker.name == "wandb":
                yield self._wandb
            elif tracker.name == "mlflow":
                yield MLflow(tracker.log)
            elif tracker.name == "trackio":
                yield Trackio(tracker.tracker)
            elif tracker.name == "tensorboard":
                yield TensorBoard(tracker.tracker)
            else:
                yield lambda record, log=tracker.log: log(record.flat(), step=record.step)
