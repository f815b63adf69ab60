"""What the controllers did, what was set, what was run and what is missing, and what it cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from study.config import PRIMARY, Condition
from study.reporting.activation import Activation, own_action
from study.reporting.evidence import Evidence, arm_of, condition_of, label
from study.reporting.figures import Figures, mean, unseen_slices
from study.reporting.wording import bullets, counted, folded, listed, number, percent, table
from study.traces import Run

COMMANDS = ("make study",)
"""What makes this report."""

RATES = (
    "triggered",
    "rejected",
    "shrunk",
    "projected",
    "alpha quantiles",
    "residual",
    "residual ratio",
    "precision",
    "recall",
    "its own mechanism",
)
"""Headings of the tables of activation."""


def activation_part(evidence: Evidence, found: Activation) -> Iterator[str]:
    """Say whether every condition did something of its own."""
    yield "## Activation and integrity"
    if found.ok:
        yield "Every controller acted, and no two conditions have the same traces everywhere: **ok**."
    else:
        yield "**Not ok.** Comparisons with these runs are void:"
        yield bullets(found.problems)
    if found.notes:
        yield bullets(found.notes)
    yield (
        "Rates are per update, means over seeds. Quantiles of alpha (10, 50, 90 %) are over the triggers of all seeds; "
        "a rejection has alpha 0, a projection none. The residual is the mean squared logit distance of a projection "
        "to its candidate, its ratio is over what interpolation would have left. Precision and recall are of triggers "
        "against the known shocks. What has no meaning for a condition is blank."
    )
    yield table(["condition", "arm", "seeds", *RATES], _rates(evidence))
    runs = sorted(evidence.whole_runs, key=lambda run: (run.arm, run.condition, run.seed))
    yield folded("Every run", table(["run", *RATES], (_run_rates(evidence, run) for run in runs)))


def _rates(evidence: Evidence) -> Iterator[list[str]]:
    for arm in evidence.arms:
        for condition in evidence.conditions(arm):
            found = list(evidence.of(arm, condition).values())
            runs = [run for run in evidence.whole_runs if (run.arm, run.condition) == (arm, condition)]
            first = min(runs, key=lambda run: run.seed)
            own = own_action(first, evidence.study)
            yield [
                label(condition),
                arm_of(arm).label,
                str(len(found)),
                *_cells(found),
                own and f"{own} (seed {first.seed})",
            ]


def _run_rates(evidence: Evidence, run: Run) -> list[str]:
    return [run.name, *_cells([evidence.of(run.arm, run.condition)[run.seed]]), own_action(run, evidence.study)]


def _cells(found: Sequence[Figures]) -> list[str]:
    def average(name: str) -> float | None:
        return mean([value for figures in found if (value := getattr(figures, name)) is not None])

    rates = [percent(average(f"{name}_rate")) for name in ("trigger", "rejection", "shrink", "project")]
    others = {number: ("residual", "residual_ratio"), percent: ("precision", "recall")}
    rest = [
        "" if average(name) is None else written(average(name)) for written, names in others.items() for name in names
    ]
    return [*rates, _quantiles([alpha for figures in found for alpha in figures.alphas]), *rest]


def _quantiles(alphas: Sequence[float]) -> str:
    if not any(alphas):
        return ""
    return ", ".join(number(float(value), 2) for value in np.quantile(alphas, (0.1, 0.5, 0.9)))


def setup_part(evidence: Evidence, commands: Sequence[str]) -> Iterator[str]:
    """Every setting, arm, condition and seed, and the compute that was used."""
    study = evidence.study
    yield "## Setup"
    yield f"Made by {listed([f'`{command}`' for command in commands])}; all settings are in `config.py`."
    settings = ([f"`{f.name}`", _shown(getattr(study, f.name))] for f in fields(study))
    yield folded("Every setting", table(["setting", "value"], settings))
    head = ["condition", "number in the paper", "budgets", "controller", "reference of the penalty", "other"]
    yield table(head, _rules(evidence))
    yield table(["arm", "learning rate", "shocks", "seeds of each condition"], _arms(evidence))
    yield (
        "Held-out reward and movement are measured on prompts that no run trains on or audits; "
        f"{_unseen(evidence)}. M = ΔR · S_stability · S_worst: ΔR is the gain in held-out reward, S the mean over "
        f"accepted updates of min(1, tolerance / K) on held-out prompts, with tolerances of "
        f"{number(study.tolerance_mean)} (K_global) and {number(study.tolerance_slices)} (worst slice) nats per "
        "token; M = ΔR where ΔR <= 0. A run that accepts no update has S = 1: read M with its components. The "
        "tolerances are wider than the budgets, so that a controller has S = 1, or nearly, by construction. As the "
        "slices' budget equals that of the mean, it is the worst slice that binds wherever both are in force; the "
        "global gate lets a slice go further."
    )
    yield _compute(evidence)
    yield missing(evidence)


def _unseen(evidence: Evidence) -> str:
    names = sorted({name for run in evidence.whole_runs for name in unseen_slices(run)})
    return f"of the slices {listed(names)} nothing else is seen" if names else "no slice is held out whole"


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(_shown, value))
    return number(value, 6) if isinstance(value, float) else str(value)


def _rules(evidence: Evidence) -> Iterator[list[str]]:
    for name in dict.fromkeys(condition for arm in evidence.arms for condition in evidence.conditions(arm)):
        rule = condition_of(name)
        budgets = [f"{limit} {number(getattr(evidence.study, f'budget_{limit}'))}" for limit in rule.limits]
        yield [
            rule.label,
            "" if rule.paper is None else str(rule.paper),
            " and ".join(budgets),
            f"{rule.controller}({_options(rule.options)})" if rule.limits else "measures only",
            f"{rule.reference} {_options(rule.reference_options)}".strip(),
            ", ".join(_others(rule)),
        ]


def _others(rule: Condition) -> Iterator[str]:
    if rule.target_kl is not None:
        yield f"target KL {number(rule.target_kl)}"
    if rule.adaptive_kl is not None:
        yield f"beta adapts: {_options(rule.adaptive_kl)}"
    if rule.warm_start:
        yield "warm start"


def _options(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in options.items())


def _arms(evidence: Evidence) -> Iterator[list[str]]:
    factor, when = number(evidence.study.shock_factor), _shown(evidence.study.shocks)
    for name in evidence.arms:
        arm = arm_of(name)
        runs = [f"{label(c)}: {seed_range(list(evidence.of(name, c)))}" for c in evidence.conditions(name)]
        shocks = f"x {factor} at t = {when}" if arm.shocked else "none"
        yield [arm.label, number(arm.learning_rate), shocks, "; ".join(runs)]


def seed_range(seeds: Sequence[int]) -> str:
    """Write seeds, as a range if they are one.

    >>> seed_range([0, 1, 2]), seed_range([0, 2])
    ('0 to 2', '0, 2')
    """
    if len(seeds) > 2 and list(seeds) == list(range(seeds[0], seeds[-1] + 1)):
        return f"{seeds[0]} to {seeds[-1]}"
    return ", ".join(map(str, seeds))


def _compute(evidence: Evidence) -> str:
    devices = sorted({str(run.result.get("device", "unknown device")) for run in evidence.whole_runs})
    hours = {arm: seconds / 3600 for arm, seconds in evidence.seconds.items()}
    branching = sum(branch.get("seconds") or 0.0 for branch in evidence.branches) / 3600
    parts = [f"{arm_of(arm).label} {number(value)}" for arm, value in hours.items()]
    return (
        f"Compute, in hours of updates (without scoring and held-out audits): "
        f"{counted(len(evidence.whole_runs), 'run')} {number(sum(hours.values()))} on {listed(devices)} "
        f"({', '.join(parts)}); the proposals of {len(evidence.branches)} branches {number(branching)}."
    )


def missing(evidence: Evidence) -> str:
    """Say what the plan has and the study has not."""
    found = evidence.missing
    if not found:
        return "Every planned run is there."
    cells = [
        f"{label(c)}, {arm_of(arm).label}: seed{'s' * (len(seeds) > 1)} {seed_range(seeds)}"
        for (arm, c), seeds in found.items()
    ]
    primary = any((PRIMARY[0], condition) in found for condition in PRIMARY[1:])
    note = " **Some of these are of the primary contrast.**" if primary else ""
    return f"**Missing: {counted(sum(map(len, found.values())), 'planned run')}.**{note}\n\n{bullets(cells)}"
