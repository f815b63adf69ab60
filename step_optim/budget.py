"""Budgets: how far one step may move the policy."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any

from step_optim.bound import Bound as Bound
from step_optim.bound import Bounds, check_bound, members, of_slice, resolved, resolved_slices
from step_optim.limits import Limits as Limits
from step_optim.limits import Verdict as Verdict
from step_optim.movement import Movement
from step_optim.trigger_rate import figures
from step_optim.warm_up import WarmUp

FEW = 8
"""Steps of a warm-up below which it is warned of."""


@dataclass(frozen=True, init=False)
class Budget:
    """Movement allowed per step, and from the start of training, in nats per token.

    Args:
        mean: eps_g, for the mean over all control prompts, of one step.
        slices: eps_s: one number for every slice, or a mapping slice -> number
            (slices that it does not name are unlimited).
        drift: cap on the mean drift from pi_ref, the policy at the start
            of training.
        drift_slices: cap on the drift of slices, like ``slices``.
        prompt: for the prompt of the control set that moves most, of one step.
        token: for the response token that moves most [nats], of one step.
        confidence: between 0.5 and 1. A mean, a slice or a drift is then held
            against its budget by its upper confidence bound over all prompts
            like these (see `precision.upper_bound`), instead of by itself.
        reference: another name of ``drift``.
        path: cap on the path length: the sum of the mean movements of all
            committed steps, over resumes, and over stages of training with a
            `Ledger`. A step may then move the mean by no more than what is
            left of it: min(eps_g, path - path so far). What is left is 0 once
            it is below 1e-6 of the cap. It does not bound the drift: n equal
            steps in one direction drift n times as far as their KLs add up to.
        path_slices: cap on the path length of slices, like ``slices``.

    With ``confidence``, what a path has left is compared with the upper bound
    of the step's movement, and the path goes on by the movement itself.

    Each number may be a callable of the step index (a schedule), and
    ``math.inf`` turns a part off: ``Budget(mean=math.inf)`` only measures.

    Raises:
        ValueError: NaN, negative, or nothing limited at all; a confidence that is none.
        TypeError: not a number and not callable; both ``drift`` and ``reference``.

    >>> Budget(mean=0.03, slices={"safety": 0.01}).at(0, ["math", "safety"]).slices
    {'safety': 0.01}
    >>> Budget(reference=0.05)
    Budget(drift=0.05)
    """

    mean: Bound | None
    slices: Bounds
    drift: Bound | None
    drift_slices: Bounds
    prompt: Bound | None
    token: Bound | None
    confidence: float | None
    path: Bound | None
    path_slices: Bounds

    def __init__(
        self,
        mean: Bound | None = None,
        slices: Bounds = None,
        drift: Bound | None = None,
        drift_slices: Bounds = None,
        *,
        prompt: Bound | None = None,
        token: Bound | None = None,
        confidence: float | None = None,
        reference: Bound | None = None,
        path: Bound | None = None,
        path_slices: Bounds = None,
    ) -> None:
        """Refuse bad numbers now, before any weight moves."""
        if reference is not None and drift is not None:
            raise TypeError(f"drift={drift!r} and reference={reference!r} are two names of one cap; give one of them")
        cap = drift if reference is None else reference
        given: dict[str, Any] = {"mean": mean, "slices": slices, "drift": cap, "drift_slices": drift_slices}
        given |= {"prompt": prompt, "token": token, "path": path, "path_slices": path_slices}
        if all(bound is None for bound in given.values()):
            raise ValueError(
                "Budget() limits nothing; pass mean=, slices=, drift= or drift_slices= in nats per token, or prompt= "
                "or token= for the worst one, or path= or path_slices= for all steps together (mean=math.inf to only "
                "measure)"
            )
        for name, bound in given.items():
            called = "reference" if name == "drift" and reference is not None else name
            check_bound(bound, called, may_map="slices" in name)
            object.__setattr__(self, name, bound)
        object.__setattr__(self, "confidence", _checked_confidence(confidence))
        means = (mean, slices, cap, drift_slices, path, path_slices)
        if confidence is not None and all(bound is None for bound in means):
            raise ValueError(
                f"budget.confidence={confidence!r} is about means, and only prompt= or token= is limited; give mean=, "
                "slices=, drift= or drift_slices= too, or leave confidence out"
            )

    @classmethod
    def of(cls, value: Budget | Bound) -> Budget:
        """Read ``budget=0.03`` as ``Budget(mean=0.03)``."""
        return value if isinstance(value, Budget) else Budget(mean=value)

    @staticmethod
    def auto(warmup: int = 20, trigger_rate: float = 0.05, *, ceiling: Budget | Bound | None = None) -> AutoBudget:
        """Return a budget that measures the first steps, and then fixes itself.

        The first ``warmup`` steps are not limited, but by ``ceiling``. Then the
        mean and each slice (spans, too) get budgets that about this share of
        steps like those would be over, whichever of them it is; see
        `trigger_rate.budgets_at` for the method, and for how far it holds. The
        first quarter of the warm-up is left out: movement often differs there.

        Fixed budgets stay until `STEPOptimizer.set_budget`, and a checkpoint
        keeps them. `logging` tells them ("step_optim"), and so do `summary()`,
        the record of the step that fixed them, and all records after it.

        A step counts if it moved the policy: not if it changed nothing, was
        not finite, or ended in an error. A KL closure that is given for one
        step (``step(kl=...)``) measures other prompts than the bound one, and
        does not count beside it. A closure that is bound during the warm-up
        counts together with the one before: if it measures other prompts,
        begin anew with `STEPOptimizer.set_budget`. Under torch.distributed the figures are those
        of all processes, so all of them fix the same budgets.

        The warm-up should be longer than that of the learning rate: movement
        grows like the square of the rate, and budgets never loosen by
        themselves.

        Args:
            warmup: how many steps to measure, at least 2; 20 or more are better.
            trigger_rate: of the steps, about how many should be over budget.
            ceiling: upper bounds, during the warm-up and afterwards. Its caps on the drift and the path, its limits
                of the worst prompt and token and its confidence are in force all the time.

        Raises:
            TypeError: a number of steps or a rate that is no number.
            ValueError: fewer than 2 steps, a rate that is not between 0 and 1, a ceiling that is automatic itself.

        >>> Budget.auto(warmup=50, trigger_rate=0.1)
        Budget.auto(warmup=50, trigger_rate=0.1)
        """
        if not isinstance(ceiling, Budget):
            check_bound(ceiling, "ceiling", may_map=False)
        budget = AutoBudget(warmup, trigger_rate, None if ceiling is None else Budget.of(ceiling))
        if warmup < FEW:
            warnings.warn(
                f"warmup={warmup}: so few steps say little about the next. Where 0.05 was asked, 0.05 to 0.3 of these "
                f"were over budget in simulations; take {FEW} or more, better 20",
                stacklevel=2,
            )
        return budget

    @property
    def reference(self) -> Bound | None:
        """Another name of `drift`."""
        return self.drift

    @property
    def _bounds(self) -> list[Bound | None]:
        by_slice = (bound for _, part in self._by_slice for bound in members(part))
        return [self.mean, self.drift, self.prompt, self.token, self.path, *by_slice]

    @property
    def _by_slice(self) -> list[tuple[str, Bounds]]:
        return [("slices", self.slices), ("drift_slices", self.drift_slices), ("path_slices", self.path_slices)]

    @property
    def limits_anything(self) -> bool:
        """Whether any part is finite, or a schedule; if not, the optimizer only measures."""
        return any(bound is not None and bound != math.inf for bound in self._bounds)

    @property
    def caps_drift(self) -> bool:
        """Whether there is a cap on the drift, finite or a schedule."""
        caps = [self.drift, *members(self.drift_slices)]
        return any(bound is not None and bound != math.inf for bound in caps)

    @property
    def is_scheduled(self) -> bool:
        """Whether any part is a callable of the step index."""
        return any(callable(bound) for bound in self._bounds)

    def limited_slices(self, slices: Iterable[str]) -> list[str]:
        """Return those of some slices that are limited, at any step.

        >>> Budget(mean=0.1, slices={"safety": 0.03}).limited_slices(["math", "safety"])
        ['safety']
        """
        return [
            name for name in slices if any(of_slice(part, name) not in (None, math.inf) for _, part in self._by_slice)
        ]

    def check_slices(self, names: Iterable[str] | None) -> None:
        """Refuse a budget for slices that the KL closure does not have.

        Args:
            names: the closure's slices; None if it cannot say before it is called.
        """
        for part, bounds in self._by_slice:
            if names is None or bounds is None:
                continue
            known = sorted(names)
            if not known:
                raise ValueError(
                    f"budget.{part}={bounds!r}, but the control set has no slices; name some with "
                    f"slices={{...}} there, or leave budget.{part} out"
                )
            unknown = [name for name in bounds if name not in known] if isinstance(bounds, Mapping) else []
            if unknown:
                raise ValueError(f"budget.{part} names the unknown slice {unknown[0]!r}; known slices: {known}")

    def check_measured(self, movement: Movement) -> None:
        """Refuse a candidate's movement that an automatic budget cannot be told from."""

    def seen(self, movement: Movement) -> Budget:
        """Return the budget of the steps to come, after a candidate that moved the policy so far."""
        return self

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: of an automatic budget what it has seen, of others nothing."""
        return {}

    def loaded(self, state: Mapping[str, Any]) -> Budget:
        """Return the budget of a run that is resumed: what was given stays, an automatic one goes on."""
        return self

    def at(self, step: int, slices: Iterable[str] = ()) -> Limits:
        """Resolve schedules at a step index, for the slices that exist; `Limits.after` takes off the path so far."""
        names = list(slices)
        return Limits(
            resolved(self.mean, step, "mean"),
            resolved_slices(self.slices, step, "slices", names),
            resolved(self.drift, step, "drift"),
            resolved_slices(self.drift_slices, step, "drift_slices", names),
            resolved(self.prompt, step, "prompt"),
            resolved(self.token, step, "token"),
            self.confidence,
            resolved(self.path, step, "path"),
            resolved_slices(self.path_slices, step, "path_slices", names),
        )

    def __repr__(self) -> str:
        given = {each.name: getattr(self, each.name) for each in fields(self)}
        return f"Budget({', '.join(f'{name}={bound!r}' for name, bound in given.items() if bound is not None)})"


@dataclass(frozen=True, init=False, repr=False)
class AutoBudget(Budget):
    """A budget that fixes itself after the first steps: `Budget.auto`.

    It is immutable, as every budget: `seen` returns the one for the steps to
    come. ``mean``, ``slices``, ``drift`` and so on are the ceiling's; what is
    in force says `at`. It has a budget for each slice that its first step
    measured, so KL closures with others are refused.
    """

    ceiling: Budget | None
    """Upper bounds, as they were given."""
    warm_up: WarmUp
    """What was seen so far, or what came out."""

    def __init__(self, warmup: int, trigger_rate: float, ceiling: Budget | None = None) -> None:
        if isinstance(ceiling, AutoBudget):
            raise ValueError(f"ceiling={ceiling!r} is automatic itself; give numbers, such as Budget(mean=0.1)")
        above = Budget(mean=math.inf) if ceiling is None else ceiling
        super().__init__(
            above.mean,
            above.slices,
            above.drift,
            above.drift_slices,
            prompt=above.prompt,
            token=above.token,
            confidence=above.confidence,
            path=above.path,
            path_slices=above.path_slices,
        )
        object.__setattr__(self, "ceiling", ceiling)
        object.__setattr__(self, "warm_up", WarmUp(warmup, trigger_rate, above.confidence))

    def _with(self, warm_up: WarmUp) -> AutoBudget:
        other = copy.copy(self)
        object.__setattr__(other, "warm_up", warm_up)
        return other

    @property
    def fixed(self) -> Mapping[str, float]:
        """The budgets that came out of the warm-up, by constraint; empty before its end."""
        return self.warm_up.fixed

    @property
    def limits_anything(self) -> bool:
        """It will: the optimizer keeps what it needs to take a step back from the start."""
        return True

    @property
    def is_scheduled(self) -> bool:
        """Its limits are others after the warm-up."""
        return True

    def limited_slices(self, slices: Iterable[str]) -> list[str]:
        """Return all of them: each gets a budget."""
        return list(slices)

    def check_slices(self, names: Iterable[str] | None) -> None:
        """Refuse a KL closure with slices that the ceiling does not know, or the first steps did not measure."""
        super().check_slices(names)
        if names is not None:
            self.warm_up.check_slices(names)

    def check_measured(self, movement: Movement) -> None:
        """Refuse a movement without the spread over prompts, where a confidence needs it."""
        if movement.is_finite and not self.fixed:
            figures(movement, self.confidence)

    def seen(self, movement: Movement) -> AutoBudget:
        """Return the budget of the steps to come; the last step of the warm-up fixes it."""
        warm_up = self.warm_up.plus(movement)
        return self if warm_up is self.warm_up else self._with(warm_up)

    def state_dict(self) -> dict[str, Any]:
        """Return what was seen, or what came out."""
        return self.warm_up.state_dict()

    def loaded(self, state: Mapping[str, Any]) -> AutoBudget:
        """Go on from a checkpoint, or begin if that is of another budget."""
        return self._with(self.warm_up.loaded(state))

    def at(self, step: int, slices: Iterable[str] = ()) -> Limits:
        """Return the ceiling's limits, after the warm-up no higher than the fixed ones."""
        return self.warm_up.within(super().at(step, slices))

    def __repr__(self) -> str:
        return f"{self.warm_up}{'' if self.ceiling is None else f' below {self.ceiling!r}'}"


def _checked_confidence(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"budget.confidence={value!r} is no number; give 0.95, say")
    if not 0.5 <= float(value) < 1:
        raise ValueError(
            f"budget.confidence={value!r} must be at least 0.5 and below 1: 0.95 asks that the budget holds over all "
            "prompts like these in 95 of 100 cases"
        )
    return float(value)
