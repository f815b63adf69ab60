"""What the demo says in the end: the two runs side by side, and one paragraph computed from their records."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from step_optim import Movement, StepRecord


RUNS = WITH, WITHOUT = "with STEP", "without STEP"
SHOCK = 4.0
"""Factor on the learning rate of the shocked update."""


@dataclass(frozen=True)
class Limits:
    """The budget against which both runs are judged, also the one that is not held to it."""

    mean: float
    """eps_g [nats per token]"""
    slices: float
    """eps_s [nats per token]"""

    def use(self, movement: Movement) -> float:
        """Return the part of the budget that a movement uses; above 1 it is infeasible."""
        return max(movement.mean / self.mean, movement.worst[1] / self.slices)


@dataclass(frozen=True)
class RunResult:
    """One finished run."""

    name: str
    """as on the screen"""
    records: list[StepRecord]
    """one for each PPO update"""
    final_reward: float
    """mean over fresh responses of the last policy"""
    seconds: float
    """wall time"""
    log: Path
    """the trace"""

    @property
    def rewards(self) -> list[float]:
        """Reward of the policy after 0, 1, ... updates."""
        return [*(record.reward or 0.0 for record in self.records), self.final_reward]

    @property
    def drifts(self) -> list[float]:
        """Movement from the first policy after 0, 1, ... updates [nats per token]."""
        return [0.0, *(record.reference_drift.mean for record in self.records if record.reference_drift)]

    @property
    def controlled(self) -> list[tuple[int, StepRecord]]:
        """The updates, counted from 1, that were not committed as proposed."""
        return [(i, record) for i, record in enumerate(self.records, 1) if record.triggered]

    @property
    def furthest(self) -> tuple[int, StepRecord]:
        """The update, counted from 1, that moved the policy furthest."""
        return max(enumerate(self.records, 1), key=lambda item: item[1].accepted.mean)

    @property
    def worst_slice(self) -> tuple[str, float]:
        """The slice that one update moved furthest, and how far."""
        return max((record.accepted.worst for record in self.records), key=lambda item: item[1])

    @property
    def overhead_seconds(self) -> float:
        """Time that went into snapshots, audits and searches."""
        phases = ("snapshot", "audit", "search")
        return sum(record.seconds.get(phase, 0.0) for record in self.records for phase in phases)


def comparison(runs: list[RunResult], limits: Limits) -> Table:
    """Return the runs side by side."""
    table = Table(title="The two runs", title_style="bold", title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("KL in nats per token", style="dim")
    for run in runs:
        table.add_column(run.name, justify="right")
    rows = {
        "updates": lambda run: str(len(run.records)),
        "  proposed over budget": lambda run: str(sum(limits.use(r.candidate) > 1 for r in run.records)),
        "  committed over budget": lambda run: str(sum(limits.use(r.accepted) > 1 for r in run.records)),
        f"furthest move of one update (budget {limits.mean:g})": lambda run: f"{run.furthest[1].accepted.mean:.4f}",
        f"  in any slice (budget {limits.slices:g})": lambda run: "{} {:.4f}".format(*run.worst_slice),
        "drift of the last policy from the first": lambda run: f"{run.drifts[-1]:.4f}",
        "reward of the first policy": lambda run: f"{run.rewards[0]:.2f}",
        "reward of the last policy": lambda run: f"{run.final_reward:.2f}",
        "seconds": lambda run: f"{run.seconds:.0f}",
        "  for audits and control": lambda run: f"{run.overhead_seconds:.0f}",
    }
    for label, cell in rows.items():
        table.add_row(label, *map(cell, runs))
    return table


def takeaway(runs: list[RunResult], limits: Limits, shock_at: int) -> str:
    """Say in words what the figures show; the first run is the one with STEP."""
    step, bare = runs
    return " ".join((_shock(step, limits, shock_at), _moves(step, bare), _ends(step, bare)))


def _shock(step: RunResult, limits: Limits, shock_at: int) -> str:
    controlled = [f"update {i} ({describe(record)})" for i, record in step.controlled]
    what = f"STEP controlled {listed(controlled)}" if controlled else "no update left the budget, so STEP never acted"
    if not shock_at:
        return f"{what[0].upper()}{what[1:]}."
    candidate = step.records[shock_at - 1].candidate
    return (
        f"The learning-rate shock made update {shock_at} propose a move of {candidate.mean:.4f} nats per token, "
        f"using {limits.use(candidate):.1f} times the budget; {what}."
    )


def describe(record: StepRecord) -> str:
    """Say what a controller did, with the part that it let through if that is a number."""
    done = {"shrink": "shrunk", "reject": "rejected", "project": "projected"}.get(record.action.value, "kept")
    partly = record.alpha is not None and 0 < record.alpha < 1
    return f"{done} to {record.alpha:.0%}" if partly else done


def _moves(step: RunResult, bare: RunResult) -> str:
    (update, record), kept = bare.furthest, step.furthest[1].accepted
    return (
        f"No update with STEP moved the policy by more than {kept.mean:.4f} nats per token "
        f"({step.worst_slice[1]:.4f} in the worst slice); without it, update {update} moved it by "
        f"{record.accepted.mean:.4f} ({bare.worst_slice[1]:.4f} in the worst slice)."
    )


def _ends(step: RunResult, bare: RunResult) -> str:
    return (
        f"The last policies are {step.drifts[-1]:.3f} (with) and {bare.drifts[-1]:.3f} (without) nats per token "
        f"away from the first, at rewards of {step.final_reward:.2f} and {bare.final_reward:.2f}, "
        f"from {step.rewards[0]:.2f}. One seed: a demonstration, not a comparison of methods."
    )


def listed(items: list[str]) -> str:
    """Join as in a sentence.

    >>> listed(["a", "b", "c"])
    'a, b and c'
    """
    return " and ".join(filter(None, (", ".join(items[:-1]), *items[-1:])))
