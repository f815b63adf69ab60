"""Searches for the largest feasible alpha. Pure: they know a point only by its KL / budget ratios."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

from step_optim.controllers.bracket import Bracket, Found, Ratios
from step_optim.controllers.curves import model_alpha, model_is_done, no_room

MODEL_TRIALS = 4
"""Model-guided trials before bisection steps in whenever one did not halve the bracket; real steps need 2 to 3."""

MAX_REPEATS = 64
"""Alphas at most whose weights turn out to be known; they cost no audit, but rounding the weights."""

PROBES, ZOOMS = 32, 4
"""Alphas whose realised parts are looked at at once, and how often: to 1e-6 of the bracket."""

Profile: TypeAlias = "dict[str, list[float]]"
"""What is remembered: by constraint, the slopes of log h over alpha, h = sqrt(K / eps) / alpha, of two searches."""


STEEPEST = 100.0
"""|slope| beyond which a remembered one is no measurement: h would change e^50 times from alpha = 0.5 to 1."""


def read_profile(state: Mapping[str, Any]) -> Profile:
    """Read a profile from a checkpoint.

    Raises:
        Exception: of any kind, if it is none.
    """
    profile = {str(name): [float(slope) for slope in slopes] for name, slopes in state.items()}
    for name, slopes in profile.items():
        if not 1 <= len(slopes) <= 2 or not all(abs(slope) <= STEEPEST for slope in slopes):
            raise ValueError(f"profile[{name!r}]={slopes} are no two slopes")
    return profile


P = TypeVar("P", bound=Ratios)

Realised: TypeAlias = "Callable[[Sequence[float]], list[float]]"
"""alphas -> which part of the update rounding leaves of each."""


class _Step(NamedTuple):
    asked: float
    """alpha."""
    realised: float
    """What rounding makes of it."""


def largest_feasible(
    measure: Callable[[float], P],
    at_one: P,
    *,
    at_zero: Mapping[str, float] | None = None,
    search: str,
    tol: float,
    max_trials: int,
    strict: bool = False,
    min_alpha: float = 0.0,
    profile: Profile | None = None,
    realised: Realised | None = None,
) -> tuple[float, P] | None:
    """Find the largest alpha in (0, 1) whose audit is feasible, to a relative tolerance.

    Args:
        measure: audits an alpha. Points that say that their weights were audited before (`Point.again`) cost no trial.
        at_one: the audit of alpha = 1, infeasible.
        at_zero: KL / budget at alpha = 0, where it is not 0: drift has a cap, and theta_t has drifted before.
        search: ``"bisect"`` halves the bracket. ``"backtrack"`` halves alpha
            until it is feasible, then bisects what it jumped over (with
            ``tol=0.5`` that is nothing: plain backtracking). ``"model"`` uses
            that K(alpha) is nearly proportional to alpha², and that drift is nearly a parabola.
        tol: relative, in alpha.
        max_trials: audits at most; the best feasible alpha found so far is the answer.
        strict: see `model_is_done`.
        min_alpha: give up below this.
        profile: of the searches before this one, for ``"model"`` to begin
            with; this one's slopes are put into it, if something was found.
        realised: what rounding would make of some alphas. The search then
            works with what is realised, in which K is a parabola still, and
            ends when no step lies between the ends of its bracket.

    Returns:
        (alpha, its point), or None if no feasible alpha was found.
    """
    remembered = {name: _agreed(slopes) for name, slopes in (profile or {}).items()}
    bracket = Bracket(_found(1.0, at_one), remembered, at_zero)
    best: tuple[_Step, P] | None = None
    trials = repeats = 0
    known = False
    while trials < max_trials and repeats < MAX_REPEATS:
        if bracket.closed(tol) or (search == "model" and not strict and model_is_done(bracket, tol)):
            break
        if search == "model" and no_room(bracket, min_alpha):
            break
        alpha = max(bracket.middle if known else _next(search, bracket, tol, trials), min_alpha)
        if alpha >= bracket.high:
            break  # even the smallest alpha was infeasible
        step = _Step(alpha, alpha) if realised is None else _nearest_step(realised, alpha, bracket, tol)
        if step is None:
            break  # there is nothing between the ends
        point = measure(step.asked)
        found, again = _found(step.realised, point), getattr(point, "again", False)
        known = again and any(found.roots == other.roots for other in bracket.found)
        if known:  # it is one of the bracket's ends: go on to where the weights are other ones
            bracket.narrow(step.realised, point.feasible)
            repeats += 1
            continue
        bracket.add(found, step.asked)
        trials += not again
        if point.feasible and (best is None or step.realised > best[0].realised):
            best = step, point
    if best is None:
        return None
    if profile is not None:
        slopes = _slopes(bracket.found[0], _found(best[0].realised, best[1]))
        for name, slope in ((name, slope) for name, slope in slopes.items() if name not in bracket.starts):
            profile[name] = [*profile.get(name, []), max(-STEEPEST, min(slope, STEEPEST))][-2:]
    return best[0].asked, best[1]


def _nearest_step(realised: Realised, aim: float, bracket: Bracket, tol: float) -> _Step | None:
    """The alpha of which rounding leaves most that is not more than the aim; else the least that is more.

    None if neither lies inside of the bracket, by a small part of the tolerance.
    """
    low, high = _Step(bracket.asked[0], bracket.low), _Step(bracket.asked[1], bracket.high)
    for _ in range(ZOOMS):
        alphas = [low.asked + (high.asked - low.asked) * i / PROBES for i in range(1, PROBES)]
        steps = [_Step(alpha, part) for alpha, part in zip(alphas, realised(alphas), strict=True)]
        low = max([low, *(step for step in steps if step.realised <= aim)], key=lambda step: step.asked)
        high = min([high, *(step for step in steps if step.realised > aim)], key=lambda step: step.asked)
        if low.realised >= (1 - 0.1 * tol) * aim or low.asked >= high.asked:
            break
    if low.realised > (1 + 0.1 * tol) * bracket.low:
        return low
    return high if high.realised < (1 - 0.1 * tol) * bracket.high else None


def _agreed(slopes: list[float]) -> float:
    """What the last two searches agree on: the smaller slope if their signs are the same, else nothing.

    Where slopes change at random from step to step, the last one alone would
    mislead: on 14 recorded steps of LoRA training it costs a tenth more audits
    than no memory at all, and this costs nothing.
    """
    return math.copysign(min(map(abs, slopes)), slopes[0]) if len(slopes) == 2 and slopes[0] * slopes[1] > 0 else 0.0


def _slopes(at_one: Found, best: Found) -> dict[str, float]:
    """The slope of each constraint's log h between these two, where both are known."""
    return {
        name: (math.log(root / best.alpha) - math.log(at_one.roots[name])) / (best.alpha - 1)
        for name, root in best.roots.items()
        if root > 0 and math.isfinite(at_one.roots.get(name, math.inf)) and at_one.roots[name] > 0
    }


def _found(alpha: float, point: Ratios) -> Found:
    return Found(alpha, {name: math.sqrt(ratio) for name, ratio in point.ratios.items()}, point.feasible)


def _next(search: str, bracket: Bracket, tol: float, trial: int) -> float:
    if search == "model" and (trial < MODEL_TRIALS or bracket.halved):
        return model_alpha(bracket, tol)
    if search == "backtrack" and bracket.low == 0:
        return 0.5 * bracket.high
    return bracket.middle
