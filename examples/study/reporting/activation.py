"""Did every condition do something of its own? Before any result: rates of all runs, and what would void the study.

A label whose traces are those of another label, and a controller that never acted, are the failures that made the
paper's comparison empty. Both fail the study here, by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from step_optim import Action
from step_optim.telemetry import integrity
from study.config import Condition, Study
from study.reporting.evidence import arm_of, condition_of
from study.reporting.figures import accepted_records, is_limited, within
from study.traces import Run

SHRUNK = "shrink"
"""The branch whose controller must have something to do."""

POINTS = 3
"""Branching points below which equal figures may be chance: two rejections differ only in a later, coarse reward."""


@dataclass(frozen=True)
class Activation:
    """What `check` found."""

    problems: tuple[str, ...]
    """each of them voids a comparison"""
    notes: tuple[str, ...]
    """what a reader should know, and voids nothing"""
    rates: tuple[str, ...]
    """what every run did, a line each"""

    @property
    def ok(self) -> bool:
        """Whether every condition did something, and something of its own."""
        return not self.problems

    def __str__(self) -> str:
        return "\n".join([*self.rates, *self.notes, *self.problems, "ok" if self.ok else "not ok"])


def check(runs: Sequence[Run], branches: Sequence[Mapping[str, Any]], study: Study | None = None) -> Activation:
    """Look for conditions that never acted, and for traces that are the same."""
    study = study or Study()
    if not runs:
        return Activation(("NO RUNS: nothing was measured",), (), ())
    whole = [run for run in runs if run.records and len(run.records) == len(run.updates)]
    idle = {run.name for run in whole if is_idle(run, study)}
    never, calm = _never_acted(whole, idle)
    identical, excused = _identical(whole, idle)
    forked, few = _branches(branches)
    problems = [*_damaged(runs), *_budgets(whole), *never, *identical, *_arms_and_seeds(whole), *forked]
    notes = [f"note: {name} never acted; other seeds of that condition did" for name in _idle_alone(whole, idle)]
    return Activation(tuple(problems), (*calm, *notes, *excused, *few), tuple(map(_rates, whole)))


def is_idle(run: Run, study: Study) -> bool:
    """Whether a run's condition has a mechanism, and the mechanism changed nothing in this run."""
    condition = condition_of(run.condition)
    updates = run.updates
    if condition.limits or is_limited(run):
        return not any(record.triggered for record in run.records)
    if condition.target_kl is not None:
        return all(update.get("minibatches", 0) >= study.epochs * study.minibatches for update in updates)
    if condition.adaptive_kl is not None:
        return len({update.get("beta") for update in updates}) == 1
    if condition.reference == "ratchet":
        acts = "held" if "cap" in condition.reference_options else "moved"
        return not any(update.get("reference") == acts for update in updates)
    return False


def own_action(run: Run, study: Study) -> str:
    """Say in a few words what a baseline's mechanism did; nothing if it has none."""
    condition, updates = condition_of(run.condition), run.updates
    if condition.target_kl is not None:
        stopped = sum(update.get("minibatches", 0) < study.epochs * study.minibatches for update in updates)
        return f"stopped early on {stopped} of {len(updates)}"
    if condition.adaptive_kl is not None:
        betas = [update["beta"] for update in updates if "beta" in update]
        return f"beta {min(betas):.3g} to {max(betas):.3g}" if betas else ""
    if condition.warm_start:
        scales = [record.scale for record in run.records]
        return f"proposals at {min(scales):.2g} to {max(scales):.2g} of the rate"
    if condition.reference != "fixed":
        moved, held = (sum(update.get("reference") == what for update in updates) for what in ("moved", "held"))
        return f"reference moved {moved}, held {held} times"
    return ""


def _damaged(runs: Sequence[Run]) -> Iterator[str]:
    seen: set[str] = set()
    for run in runs:
        if not run.records or len(run.records) != len(run.updates):
            yield f"DAMAGED: {run.name} has {len(run.records)} records of {len(run.updates)} updates"
        if run.name in seen:
            yield f"TWICE: {run.name} is there more than once"
        seen.add(run.name)
    for arm in dict.fromkeys(run.arm for run in runs):
        lengths = sorted({len(run.records) for run in runs if run.arm == arm})
        if len(lengths) > 1:
            yield f"LENGTHS: the runs of {arm} have {lengths} updates; they cannot be compared"


def _budgets(runs: Sequence[Run]) -> Iterator[str]:
    """Labels and budgets must agree, whatever the records call themselves."""
    for run in runs:
        limited, expected = is_limited(run), bool(condition_of(run.condition).limits)
        if expected and not limited:
            yield f"NO BUDGET: {run.name} is a controller's label, but all its budgets are infinite"
        if limited and not expected:
            yield f"BUDGET: {run.name} is a baseline's label, but it has a finite budget"
        beyond = [record.step for record in accepted_records(run) if not within(record.budget, record.accepted)]
        if beyond:
            yield f"OVER BUDGET: {run.name} committed more than its own budget at updates {beyond}"


def _never_acted(runs: Sequence[Run], idle: set[str]) -> tuple[list[str], list[str]]:
    """Conditions that did nothing in an arm: a problem; a note if it has no shocks, and they acted in another arm."""
    problems, notes = [], []
    for (arm, condition), found in _grouped(runs, "arm", "condition").items():
        if _all_idle(found, idle):
            seeds, elsewhere = len(found), [] if arm_of(arm).shocked else _acted_in(runs, condition, idle)
            if elsewhere:
                notes.append(
                    f"note: {arm}/{condition} never acted, on none of its {seeds} seeds, and is the baseline there; it "
                    f"acted in {', '.join(elsewhere)}"
                )
            else:
                problems.append(f"NEVER ACTED: {arm}/{condition}, on none of its {seeds} seeds; it shows nothing")
    return problems, notes


def _is_calm(run: Run, runs: Sequence[Run], idle: set[str]) -> bool:
    """Whether a run is of an arm without shocks, and its condition acted in another arm."""
    return not arm_of(run.arm).shocked and bool(_acted_in(runs, run.condition, idle))


def _acted_in(runs: Sequence[Run], condition: str, idle: set[str]) -> list[str]:
    """Arms in which a condition did something."""
    return list(dict.fromkeys(run.arm for run in runs if run.condition == condition and run.name not in idle))


def _idle_alone(runs: Sequence[Run], idle: set[str]) -> list[str]:
    """Runs that did nothing, of conditions that did something on other seeds."""
    groups = _grouped(runs, "arm", "condition").values()
    return [run.name for found in groups for run in found if run.name in idle and not _all_idle(found, idle)]


def _all_idle(runs: Iterable[Run], idle: set[str]) -> bool:
    return all(run.name in idle for run in runs)


def _identical(runs: Sequence[Run], idle: set[str]) -> tuple[list[str], list[str]]:
    """Conditions of one arm and seed with one trace: problems, and those that have an explanation."""
    problems, excused = [], []
    alone, apart = set(_idle_alone(runs, idle)), _apart(runs)
    alone |= {run.name for run in runs if run.name in idle and _is_calm(run, runs, idle)}
    for (arm, seed), found in _grouped(runs, "arm", "seed").items():
        named = {run.condition: run for run in found}
        for a, b in combinations(named, 2):
            how = _sameness(named[a], named[b])
            text = f"{arm}/{a} and {arm}/{b} have the same {how} on seed {seed}"
            if how and alone & {named[a].name, named[b].name}:
                excused.append(f"note: {text}: one of them was idle")
            elif how and _differ_in_limits(a, b) and {(arm, a, b), (arm, b, a)} & apart:
                excused.append(f"note: {text}: their budgets bound at the same updates; on other seeds they differ")
            elif how:
                problems.append(f"IDENTICAL: {text}")
    return problems, excused


def _sameness(a: Run, b: Run) -> str:
    """What two runs have in common that two conditions must not: "trace", "path", or nothing."""
    if integrity.check({"a": a.records, "b": b.records}).identical:
        return "trace"
    return "path" if _path(a) == _path(b) != () else ""


def _apart(runs: Sequence[Run]) -> set[tuple[str, str, str]]:
    """Pairs of conditions (arm, a, b) that went different ways on some seed."""
    groups = _grouped(runs, "arm", "seed").items()
    pairs = ((arm, a, b) for (arm, _), found in groups for a, b in combinations(found, 2))
    return {(arm, a.condition, b.condition) for arm, a, b in pairs if not _sameness(a, b)}


def _differ_in_limits(a: str, b: str) -> bool:
    """Whether two conditions are one controller under other budgets: a gate and a circuit breaker, say."""
    return _mechanism(condition_of(a)) == _mechanism(condition_of(b)) and bool(
        condition_of(a).limits and condition_of(b).limits
    )


def _mechanism(condition: Condition) -> Condition:
    return replace(condition, label="", paper=None, limits=())


def _path(run: Run) -> tuple[Any, ...]:
    """Where the policy went, as held-out prompts saw it; nothing if it never moved."""
    path = tuple((update["held"]["mean"], *sorted(update["held"]["slices"].items())) for update in run.updates)
    return path if any(moved[0] > 0 for moved in path) else ()


def _arms_and_seeds(runs: Sequence[Run]) -> Iterator[str]:
    """One condition in several arms and seeds: each arm has its learning rates, each seed its samples."""
    for (condition,), found in _grouped(runs, "condition").items():
        names = {f"{run.arm}/{condition}/{run.seed}": run.records for run in found}
        for a, b in integrity.check(names).identical:
            yield f"IDENTICAL: {a} and {b} have the same trace; arms and seeds must differ"


def _branches(branches: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[str]]:
    """Branches that agree everywhere, or a shrink with nothing to shrink: problems, and what few points may explain."""
    problems, notes = [], []
    points: dict[str, dict[tuple[Any, Any], Mapping[str, Any]]] = {}
    for branch in branches:
        points.setdefault(branch["branch"], {})[branch["seed"], branch["t"]] = branch
    for (a, at_a), (b, at_b) in combinations(points.items(), 2):
        shared = at_a.keys() & at_b.keys()
        if shared and all(_outcome(at_a[point]) == _outcome(at_b[point]) for point in shared):
            text = f"the branches {a} and {b} agree in every figure at all {len(shared)} points"
            few = len(shared) < POINTS
            notes.append(f"note: {text}") if few else problems.append(f"IDENTICAL: {text}")
    shrunk = [branch.get("alpha") for branch in points.get(SHRUNK, {}).values()]
    if shrunk and all(alpha is not None and alpha >= 1 for alpha in shrunk):
        problems.append(f"NEVER ACTED: the branch {SHRUNK}, at none of its {len(shrunk)} points")
    return problems, notes


def _outcome(branch: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(repr(branch.get(name)) for name in ("control", "held", "reward_now", "reward_next"))


def _grouped(runs: Iterable[Run], *names: str) -> dict[tuple[Any, ...], list[Run]]:
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault(tuple(getattr(run, name) for name in names), []).append(run)
    return groups


def _rates(run: Run) -> str:
    """What a run did, in a line."""
    rate = {action: sum(record.action is action for record in run.records) / len(run.records) for action in Action}
    triggered = sum(record.triggered for record in run.records) / len(run.records)
    acts = ", ".join(f"{action} {share:.0%}" for action, share in rate.items() if share)
    return f"{run.name}: triggered {triggered:.0%}; {acts}"
