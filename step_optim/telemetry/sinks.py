"""How each kind of experiment tracker is given a record, on a step axis of its own, and told of what is unusual."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from hashlib import sha256
from typing import Any
from weakref import WeakKeyDictionary

from step_optim.controllers.base import Action
from step_optim.telemetry.alerts import Alert
from step_optim.telemetry.record import ROOT, StepRecord

Sink = Callable[[StepRecord], None]

Spell = Callable[[str], str]
"""Writes one part of a name as a tracker takes it."""


def numbers(record: StepRecord, root: str = ROOT, spell: Spell = str) -> dict[str, float]:
    """What trackers of figures are given: flags as 0 and 1, whether the step was rejected, no texts, finite budgets."""
    flat = record.flat(root, spell) | {f"{root}/rejected": record.action is Action.REJECT}
    figures = {name: float(value) for name, value in flat.items() if isinstance(value, (int, float))}
    return {
        name: value for name, value in figures.items() if value != math.inf or not name.startswith(f"{root}/budget")
    }


_written: WeakKeyDictionary[Any, dict[str, int | None]] = WeakKeyDictionary()
"""Where the last record is in each run that counts its own steps, by root: several optimizers may log to one run."""


class WandB:
    """Logs to a run that counts its own steps, and drops what is logged with a smaller one.

    So a record goes to the step at which the run is: beside what others have
    logged there, or one further if that already has a record of ours. Its own
    step index is the x-axis. What the training loop logs with ``step=`` may
    then come too late, and W&B drops it: log it without.

    Args:
        find: returns the run, which may begin after the optimizer was made.
        root: what all names begin with.
    """

    def __init__(self, find: Callable[[], Any], root: str = ROOT) -> None:
        self._find, self._root = find, root

    def __call__(self, record: StepRecord) -> None:
        """Log a record."""
        run = self._find()
        places = _written.setdefault(run, {})
        if self._root not in places:
            run.define_metric(f"{self._root}/*", step_metric=f"{self._root}/step")
        step = _current_step(run)
        if step is None:
            run.log(record.flat(self._root))
        else:
            step += step == places.get(self._root)
            run.log(record.flat(self._root), step=step)
        places[self._root] = step

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

    def __init__(self, run: Any, root: str = ROOT) -> None:
        self._run, self._root = run, root

    def __call__(self, record: StepRecord) -> None:
        """Log a record."""
        self._run.log(record.flat(self._root), step=record.step)

    def alert(self, alert: Alert) -> None:
        """Send an alert: to the terminal, the dashboard, and a webhook if there is one."""
        send = getattr(self._run, "alert", None)
        if send is not None:  # older versions have none
            from trackio import AlertLevel

            send(alert.title, alert.text, level=AlertLevel(alert.level))


class TensorBoard:
    """Writes figures as scalars of their own, and alerts as texts, through a ``SummaryWriter``."""

    def __init__(self, writer: Any, root: str = ROOT) -> None:
        self._writer, self._root = writer, root

    def __call__(self, record: StepRecord) -> None:
        """Write a record."""
        for name, value in numbers(record, self._root).items():
            self._writer.add_scalar(name, value, global_step=record.step)
        self._writer.flush()

    def alert(self, alert: Alert) -> None:
        """Write an alert."""
        self._writer.add_text(f"{self._root}/alerts", f"**{alert.title}.** {alert.text}", global_step=alert.step)
        self._writer.flush()


MOST = 1000
"""Metrics that MLflow takes at once."""

LONGEST = 250
"""Characters of a name that MLflow takes."""

_REFUSED = re.compile(r"[^\w.\- :]|_(?=x[0-9a-f]+_)|^\.+$|^$")
"""What MLflow does not take in a part of a name, and what would be mistaken for its spelling."""


class MLflow:
    """Logs figures as metrics, by names that MLflow takes.

    Args:
        log_metrics: takes a dict and ``step=``.
        root: what all names begin with.
    """

    def __init__(self, log_metrics: Callable[..., Any], root: str = ROOT) -> None:
        self._log_metrics, self._root = log_metrics, root

    def __call__(self, record: StepRecord) -> None:
        """Log a record."""
        figures = {_shortened(name): value for name, value in numbers(record, self._root, spelt).items()}
        for metrics in _in_parts(figures, MOST):
            self._log_metrics(metrics, step=record.step)


def spelt(part: str) -> str:
    """Spell out what MLflow does not take in a part of a name; no two are spelt alike.

    >>> spelt("why?"), spelt("why_x3f_"), spelt("a/b"), spelt("..")
    ('why_x3f_', 'why_x5f_x3f_', 'a_x2f_b', '_x2e__x2e_')
    """
    return _REFUSED.sub(lambda found: "".join(f"_x{ord(c):x}_" for c in found[0]) or "_x_", part)


def _shortened(name: str) -> str:
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 17]}_{sha256(name.encode()).hexdigest()[:16]}"


def _in_parts(values: Mapping[str, float], most: int) -> Iterator[dict[str, float]]:
    names = list(values)
    for start in range(0, len(names), most):
        yield {name: values[name] for name in names[start : start + most]}


class Accelerate:
    """Gives a record to each of an Accelerator's trackers as that tracker likes it, in the main process."""

    def __init__(self, accelerator: Any, root: str = ROOT) -> None:
        self._accelerator, self._root = accelerator, root
        self._wandb = WandB(lambda: accelerator.get_tracker("wandb", unwrap=True), root)

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
        root = self._root
        for tracker in self._accelerator.trackers:
            if tracker.name == "wandb":
                yield self._wandb
            elif tracker.name == "mlflow":
                yield MLflow(tracker.log, root)
            elif tracker.name == "trackio":
                yield Trackio(tracker.tracker, root)
            elif tracker.name == "tensorboard":
                yield TensorBoard(tracker.tracker, root)
            else:
                yield lambda record, log=tracker.log: log(record.flat(root), step=record.step)
