"""What a controller sees (a Trial) and what it answers (an Outcome)."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from enum import Enum
from typing import Any

from torch import Tensor

from step_optim.audit.closure import Audit, Draw, Normal
from step_optim.controllers.bundle import Inner
from step_optim.limits import Limits, Verdict
from step_optim.movement import Movement
from step_optim.snapshot.snapshot import Snapshot


class Action(str, Enum):
    """What became of a step."""

    COMMIT = "commit"
    """The candidate was feasible and stands."""
    REJECT = "reject"
    """The weights are those before the step."""
    SHRINK = "shrink"
    """A point on the line from the previous weights to the candidate stands."""
    PROJECT = "project"
    """Weights found by distillation stand."""
    STEER = "steer"
    """Weights that were led back into the budget along its gradients stand."""
    UNCHANGED = "unchanged"
    """The inner step moved no weight; nothing was measured."""

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, eq=False)
class Point:
    """Weights that were audited: a point on the line (``alpha``), or anywhere (``weights``)."""

    audit: Audit
    """Movement from the previous weights, and the policy that was measured."""

    verdict: Verdict
    """The movement against the budgets."""

    alpha: float | None = None
    """theta_t + alpha (candidate - theta_t); None off that line."""

    weights: Sequence[Tensor] | None = None
    """The weights themselves; None if alpha tells them."""

    drift: Movement | None = None
    """Movement from pi_ref, if it was measured along with it."""

    again: bool = False
    """Whether the very same weights were audited before in this step, so that nothing was measured: rounding makes one
    point of many alphas."""

    @property
    def movement(self) -> Movement:
        """K_global and K_s [nats per token]."""
        return self.audit.movement

    @property
    def feasible(self) -> bool:
        """Whether every budget holds here."""
        return self.verdict.feasible

    @property
    def ratios(self) -> Mapping[str, float]:
        """KL / budget by constraint."""
        return self.verdict.ratios

    @property
    def constraint(self) -> str:
        """What is most exceeded, or nearest, as `Verdict.ratios` names it; or ``"not finite"``."""
        binding = self.verdict.binding
        return "not finite" if binding is None or not self.movement.is_finite else binding


@dataclass(frozen=True)
class Outcome:
    """A controller's answer: a feasible point to commit, or nothing; with what it wants in the record."""

    action: Action
    point: Point | None = None
    stalled: bool = False
    """A gate gave up rejecting; see `Gate`."""
    projection: Mapping[str, float] = field(default_factory=dict)
    """Residuals and step counts of `Project`."""
    steering: Mapping[str, float] = field(default_factory=dict)
    """Corrections and multipliers of `Steer`."""
    layers: Mapping[str, float] = field(default_factory=dict)
    """By layer, the part of its step that was made; empty if all made the same."""


class Ends:
    """theta_t and the candidate, a tensor for each piece of memory that the optimizer moves. They are to be read."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    @property
    def previous(self) -> list[Tensor]:
        """theta_t."""
        return self._snapshot.previous

    @property
    def candidate(self) -> list[Tensor]:
        """What the inner step proposed, in the same order."""
        return self._snapshot.candidate


@dataclass(frozen=True)
class Trial:
    """An infeasible candidate, and the means to try other weights. Trying leaves no trace.

    `at` and `at_weights` have the weights written and audited, and return a
    `Point`; only such a point can be accepted.
    """

    candidate: Point
    """The audited candidate, alpha = 1."""
    previous: Verdict
    """theta_t itself, alpha = 0: 0 for budgets on the step, what it has drifted so far for caps."""
    limits: Limits
    """The budgets in force. A cap that theta_t exceeds stands here as "less than theta_t's drift"."""
    budget: Limits
    """The budgets as they were set: where a cap is exceeded, what to come back to."""
    rejected_in_a_row: int
    """How many steps before this one were rejected without a commit in between."""
    kl: Any
    """The KL closure; a `LogitKL` under `Project`."""
    weights: Ends
    """``weights.previous`` and ``weights.candidate``, tensor by tensor. Read them, never write them."""
    at: Callable[[float], Point]
    """Audit theta_t + alpha (candidate - theta_t), 0 <= alpha <= 1."""
    at_weights: Callable[[Sequence[Tensor]], Point]
    """Audit any weights, one tensor for each of ``weights.previous``."""
    distill: Callable[[Sequence[Tensor], Tensor], tuple[Point, float, list[Tensor]]]
    """At some weights: the point, its distance to the mixture of strength lambda [C], the gradient of that distance."""
    draw: Callable[[int, int, Sequence[str]], Draw | None]
    """Draw prompts from the KL closure's pool: (how many, which turn, for which constraints); None without a pool."""
    normals: Callable[[Sequence[str], Sequence[Tensor], Draw | None], list[Normal]]
    """Values and gradients of constraints at any weights, on what was drawn; see `KLClosure.gradients`."""
    names: Callable[[], Mapping[str, int | None]]
    """The names of the parameters of the modules that the policy reads, in their order, as far as they are known: where
    each is in ``weights.previous``, or None if the optimizer does not move it."""
    bend: Callable[[Sequence[float]], Callable[[float], Sequence[float]]]
    """From now on go to the candidate by another way: weights, one for each of ``weights.previous``, tell how early
    each tensor's step is made. `at` then takes the share of the whole step. Returns what tells the part of each tensor
    at an alpha; see `Path`."""
    inner: Inner
    """Inner products of points, and of points with normals, a tensor for each of ``weights.previous``."""
    agree: Callable[[Any], Any] = lambda value: value
    """With several processes: the first one's value, everywhere. What a controller computes by itself, and decides on,
    goes through this; points agree already."""
    memory: dict[str, Any] = field(default_factory=dict)
    """Plain values that a controller wants to find again in the next step. They belong to the run: one controller may
    serve several optimizers, a checkpoint holds them, and a step that fails takes back what it wrote."""
    explain: Callable[[], str] = lambda: ""
    """Say why steps are rejected in a row, and what helps; for the message of an error that ends the step."""
    realised: Callable[[Sequence[float]], list[float]] | None = None
    """Which part of the update would be left of each of some alphas, about; None where rounding leaves nearly all.
    Nothing is measured for it. bf16 weights take few steps between theta_t and a candidate one ulp away."""

    @staticmethod
    def accept(point: Point, **record: Any) -> Outcome:
        """Commit a feasible point."""
        off_line = Action.STEER if record.get("steering") else Action.PROJECT
        return Outcome(Action.SHRINK if point.alpha is not None else off_line, point, **record)

    @staticmethod
    def reject(**record: Any) -> Outcome:
        """Commit nothing."""
        return Outcome(Action.REJECT, **record)


STATES = ("restore", "keep_state")
"""Values of ``on_reject`` and ``on_shrink``: the optimizer state of theta_t, or that of the candidate."""

OPTIONS = ("on_reject", "on_shrink")
"""Options that every controller has."""

NEARLY = 0.85
"""Likeness from which on a name is taken for a misspelt option: on_rejct, onreject, on_rejects, on_shrinks."""


class Controller(ABC):
    """Decides what happens to an infeasible candidate. It never writes weights itself.

    What it has to remember from step to step it puts into ``trial.memory``. A
    controller that keeps it in attributes instead serves one optimizer alone,
    and returns it in `state_dict`.

    Write one by subclassing:

    >>> class Halve(Controller):
    ...     def decide(self, trial):
    ...         half = trial.at(0.5)
    ...         return trial.accept(half) if half.feasible else trial.reject()
    >>> import torch
    >>> from step_optim import STEPOptimizer
    >>> weight = torch.nn.Parameter(torch.zeros(1))
    >>> optimizer = STEPOptimizer(
    ...     torch.optim.SGD([weight], lr=1.0), kl=lambda: float(weight) ** 2, budget=0.5, controller=Halve()
    ... )
    >>> weight.grad = -torch.ones(1)
    >>> optimizer.step()
    >>> str(optimizer.last.action), weight.item()
    ('shrink', 0.5)
    """

    on_reject: str = "restore"
    """What a rejection keeps: ``"restore"`` nothing; ``"keep_state"`` the optimizer state of the candidate, whose
    moments have seen the gradient (the paper leaves this open)."""

    on_shrink: str = "keep_state"
    """The optimizer state that goes with a smaller step: ``"keep_state"`` the candidate's, ``"restore"`` theta_t's."""

    needs_logits = False
    """Whether the KL closure must be a `LogitKL`."""

    follows_gradients = False
    """Whether it follows `KLClosure.gradients`, and without them does less."""

    pull: bool = False
    """Whether caps pull before the inner step; by how much, `shares` says."""

    patience: int | None = None
    """Rejections in a row after which it does something else by itself, so that nobody needs to be warned before."""

    shrinks = True
    """Whether `decide` may accept points on the line to the candidate."""

    @abstractmethod
    def decide(self, trial: Trial) -> Outcome:
        """Return the outcome of a step whose candidate is infeasible."""

    def check_names(self, names: Sequence[str]) -> None:
        """Refuse options that do not fit a model.

        Args:
            names: of its parameters, in its order.

        Raises:
            ValueError: an option that says nothing about them.
        """

    def shares(self, memory: Mapping[str, Any]) -> Mapping[str, float]:
        """Tell how strongly caps pull at the next inner step; see `controllers.pull`.

        Args:
            memory: what is in ``trial.memory``.

        Returns:
            Shares of the loss's gradient by cap, as in `Verdict.ratios`; caps that are missing do not pull.
        """
        return {}

    def saw(self, ratios: Mapping[str, float], memory: dict[str, Any]) -> None:
        """Look at a candidate, also at a feasible one, before anything is decided about it.

        Args:
            ratios: its KL / budget by constraint, with the budgets as they were set.
            memory: what is in ``trial.memory``.
        """

    def check_options(self) -> None:
        """Refuse unknown values of the options, and what looks like one of them misspelt, in a subclass too.

        Raises:
            ValueError: an unknown value; a name that is nearly that of an option.
        """
        for name in OPTIONS:
            _checked(f"{type(self).__name__}.{name}", getattr(self, name))
        for name in dir(self):
            meant = get_close_matches(name, OPTIONS, n=1, cutoff=NEARLY)
            if meant and name not in OPTIONS and isinstance(getattr(self, name), str):
                raise ValueError(
                    f"{type(self).__name__}.{name}={getattr(self, name)!r}: there is no such option; if {meant[0]} is "
                    f"meant, call it that, with {' or '.join(map(repr, STATES))}"
                )

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs of the controller's own attributes, besides ``trial.memory``; plain values."""
        return {}

    def copied(self, memory: Mapping[str, Any]) -> dict[str, Any]:
        """Copy what is in ``trial.memory``: for a step that may fail, and for a checkpoint."""
        return copy.deepcopy(dict(memory))

    def forget_reference(self, memory: dict[str, Any]) -> None:
        """Drop from ``trial.memory`` what holds for one pi_ref, one KL closure and one list of parameters only."""

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """Refuse a state that cannot be read, by any exception, before anything has changed.

        Args:
            state: what `state_dict` returned, and with it what was in ``trial.memory``.
        """

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned; entries of ``trial.memory`` come with it and need no care."""


def checked_on_reject(value: str) -> str:
    """Refuse an unknown ``on_reject``."""
    return _checked("on_reject", value)


def checked_on_shrink(value: str) -> str:
    """Refuse an unknown ``on_shrink``."""
    return _checked("on_shrink", value)


def _checked(option: str, value: str) -> str:
    if value not in STATES:
        raise ValueError(f"{option}={value!r} is unknown; use 'restore' or 'keep_state'")
    return value
