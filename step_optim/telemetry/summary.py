"""The figures of a run: rates, means and totals over its records."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from step_optim.controllers.base import Action
from step_optim.path_length import PathLength
from step_optim.precision import ratio_interval
from step_optim.telemetry.record import StepRecord

OWN = ("snapshot", "audit", "search")
"""Phases of a step that a bare optimizer does not have."""

PHASES = ("inner", *OWN)

TIMES = frozenset(f"{name}_seconds" for name in (*PHASES, "elapsed", "own_of_elapsed"))
"""Totals that are this process's."""

PATH = "path:"
"""Before the name of a slice, where its committed movement is added up."""

DRIFT = "drift:"
"""Before the name of a slice, where its drift is."""

BOUND = "bound:"
"""Before the name of a constraint, where steps are counted by what bound them."""

FIXED = "fixed:"
"""Before the name of a constraint, where an automatic budget was fixed."""


class Summary:
    """Running totals of a run.

    They survive a checkpoint, but for the times, which are this process's:
    equal runs have equal checkpoints. A log has the times of the whole run.

    >>> Summary().figures()["steps"]
    0
    """

    def __init__(self, sums: Mapping[str, float] | None = None) -> None:
        self._sums = dict(sums or {})

    def plus(self, record: StepRecord) -> Summary:
        """Return the totals with one more step."""
        sums, seconds = dict(self._sums), record.seconds

        def add(name: str, value: float) -> None:
            sums[name] = sums.get(name, 0) + float(value)

        add("steps", 1)
        add(str(record.action), 1)
        add("triggered", record.triggered)
        add("errors", record.error is not None or record.held_out_error is not None)
        add("references_renewed", record.reference_renewed)
        if record.kept:
            add("partial", 1)
        if record.constraint is not None:
            add(BOUND + record.constraint, 1)
        add("audits", record.audits)
        if record.triggered:
            add("trials", len(record.trials))
            add("trials_count", 1)
            sums["trials_max"] = max(sums.get("trials_max", 0.0), float(len(record.trials)))
        if record.alpha is not None and record.triggered:
            add("alpha_sum", record.alpha)
            add("alpha_count", 1)
        if record.progress is not None:
            add("progress_sum", record.progress)
            add("progress_count", 1)
        add("corrections", record.steering.get("corrections", 0.0))
        add("pulled", bool(record.pull))
        if record.candidate.is_finite:
            add("candidate_sum", record.candidate.mean)
            add("candidate_count", 1)
        add("accepted_sum", record.accepted.mean)
        for name, kl in record.accepted.slices.items():
            if math.isfinite(kl):
                add(PATH + name, kl)
        for name in (*PHASES, "elapsed"):
            add(f"{name}_seconds", seconds.get(name, 0.0))
        if "elapsed" in seconds:
            add("own_of_elapsed_seconds", sum(seconds.get(name, 0.0) for name in OWN))
        sums["accepted_max"] = max(sums.get("accepted_max", 0.0), record.accepted.mean)
        sums["worst_slice_max"] = max(sums.get("worst_slice_max", 0.0), record.accepted.worst[1])
        if record.reference_drift is not None:
            sums = {name: value for name, value in sums.items() if not name.startswith(DRIFT)}
            sums["drift"] = record.reference_drift.mean
            sums |= {DRIFT + name: kl for name, kl in record.reference_drift.slices.items()}
        ratios = record.generalisation
        if "step" in ratios:
            add("generalisation_count", 1)
            add("generalisation_log_sum", math.log(ratios["step"]))
            add("generalisation_square_sum", ratios["step_error"] ** 2)
        if "drift" in ratios:
            sums |= {"generalisation_drift": ratios["drift"], "generalisation_drift_error": ratios["drift_error"]}
        if record.fixed_budget:
            sums = {name: value for name, value in sums.items() if not name.startswith(FIXED)}
            sums |= {FIXED + name: limit for name, limit in record.fixed_budget.items()}
        return Summary(sums)

    @property
    def steps(self) -> int:
        """How many steps there were."""
        return int(self._sums.get("steps", 0))

    @property
    def path(self) -> PathLength:
        """The sum of the committed movements."""
        return PathLength(self._sums.get("accepted_sum", 0.0), dict(self._by_constraint(PATH)))

    def figures(self) -> dict[str, Any]:
        """Rates, means and totals. Rates are per step, KL in nats per token, times in seconds.

        Partial commits are triggered steps in which what the KL closure does not read kept its whole step.
        Audits per trigger are those beyond the candidate's: what a controller spends on one decision.
        ``bound`` counts triggered steps by the constraint that bound: mean, slice:<name>, prompt, token, drift,
        drift:<name>, path, path:<name> or "not finite"; ``fixed_budget`` has what `Budget.auto` was last fixed at.
        Progress is the share of what the inner optimizer proposed that was kept, see `StepRecord.progress`; corrections
        are gradients that `Steer` measured; the path length is the sum of what was committed, of which drift is what is
        left from one end to the other; the pull rate is the share of steps at which it pulled. Generalisation is
        held-out over control, of steps and of the latest drift, with 95 % intervals over prompts. The overhead's
        share is that of snapshots, audits and searches in the time between two steps: without them the training loop,
        generation included, would take 1 - share of its time.
        """
        total = self._sums.get
        steps = total("steps", 0)
        return {
            "steps": int(steps),
            **{f"{action.value}s": int(total(action.value, 0)) for action in Action if action is not Action.UNCHANGED},
            "unchanged": int(total("unchanged", 0)),
            "errors": int(total("errors", 0)),
            "references_renewed": int(total("references_renewed", 0)),
            "partial_commits": int(total("partial", 0)),
            "bound": {name: int(count) for name, count in self._by_constraint(BOUND)},
            "fixed_budget": dict(self._by_constraint(FIXED)),
            "trigger_rate": _per(total("triggered", 0), steps),
            "rejection_rate": _per(total("reject", 0), steps),
            "mean_alpha": _per(total("alpha_sum", 0), total("alpha_count", 0)),
            "mean_progress": _per(total("progress_sum", 0), total("progress_count", 0)),
            "corrections_per_step": _per(total("corrections", 0), steps),
            "pull_rate": _per(total("pulled", 0), steps),
            "audits_per_step": _per(total("audits", 0), steps),
            "audits_per_trigger": _per(total("trials", 0), total("trials_count", 0)),
            "max_audits_per_trigger": int(total("trials_max", 0)),
            "mean_candidate_kl": _per(total("candidate_sum", 0), total("candidate_count", 0)),
            "mean_accepted_kl": _per(total("accepted_sum", 0), steps),
            "max_accepted_kl": total("accepted_max", 0.0),
            "max_accepted_slice_kl": total("worst_slice_max", 0.0),
            "path_length": total("accepted_sum", 0.0),
            "path_length_by_slice": dict(self._by_constraint(PATH)),
            "reference_drift": total("drift", None),
            "reference_drift_by_slice": dict(self._by_constraint(DRIFT)),
            **self._generalisation(),
            **{f"{name}_seconds": total(f"{name}_seconds", 0.0) for name in PHASES},
            "overhead_seconds": sum(total(f"{name}_seconds", 0.0) for name in OWN),
            "elapsed_seconds": total("elapsed_seconds", 0.0),
            "overhead_share": _per(total("own_of_elapsed_seconds", 0.0), total("elapsed_seconds", 0.0)),
        }

    def _by_constraint(self, kind: str) -> Iterator[tuple[str, float]]:
        return ((name.removeprefix(kind), value) for name, value in self._sums.items() if name.startswith(kind))

    def _generalisation(self) -> dict[str, float | None]:
        """Held-out over control, with 95 % intervals.

        Of steps the geometric mean; its standard error is the root mean square
        of theirs, for they are over the same prompts. Of drift the latest.
        """
        total = self._sums.get
        count = total("generalisation_count", 0.0)
        step = math.exp(total("generalisation_log_sum", 0.0) / count) if count else None
        error = math.sqrt(total("generalisation_square_sum", 0.0) / count) if count else 0.0
        drift, drift_error = total("generalisation_drift"), total("generalisation_drift_error", 0.0)
        return _interval("generalisation_step", step, error) | _interval("generalisation_drift", drift, drift_error)

    def state_dict(self) -> dict[str, float]:
        """Plain numbers, which the constructor takes."""
        return {name: value for name, value in self._sums.items() if name not in TIMES}


def _interval(name: str, ratio: float | None, error: float) -> dict[str, float | None]:
    """A ratio and the ends of its 95 % interval; ``error`` is the standard error of its logarithm."""
    low, high = (None, None) if ratio is None else ratio_interval(ratio, error)
    return {name: ratio, f"{name}_low": low, f"{name}_high": high}


def _per(total: float, count: float) -> float | None:
    return total / count if count else None


def summarise(records: Iterable[StepRecord]) -> dict[str, Any]:
    """Return the figures of `STEPOptimizer.summary()` for a log that was read back.

    >>> summarise([])["steps"]
    0
    """
    summary = Summary()
    for record in records:
        summary = summary.plus(record)
    return summary.figures()


def lines(figures: Mapping[str, Any]) -> Iterator[str]:
    """Yield the figures of `summarise`, or of `STEPOptimizer.summary()`, as lines; figures by constraint are several.

    >>> list(lines({"rejects": 3, "bound": {"mean": 2, "slice:math": 1}, "mean_alpha": None}))[1:]
    ['bound by mean              2', 'bound by slice:math        1', 'mean_alpha                 -']
    """
    for name, value in figures.items():
        if isinstance(value, Mapping):
            joint = "by" if name == "bound" else "of"
            yield from lines({f"{name} {joint} {part}": figure for part, figure in value.items()})
        else:
            yield f"{name:26} {'-' if value is None else f'{value:.4g}'}"
