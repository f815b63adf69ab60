"""Searches for the largest feasible alpha. Pure: they know a point only by its KL / budget ratios."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar

MODEL_TRIALS = 4
"""Model-guided trials before bisection steps in whenever one did not halve the bracket; real steps need 2 to 3."""

MAX_REPEATS = 64
"""Alphas at most whose weights turn out to be known; they cost no audit, but rounding the weights."""

PROBES, ZOOMS = 32, 4
"""Alphas whose realised parts are looked at at once, and how often: to 1e-6 of the bracket."""

BOLDEST = 0.1
"""Smallest part of the bracket's upper end that a measured slope may jump to while nothing feasible is known."""


Profile: TypeAlias = "dict[str, list[float]]"
"""What is remembered: by constraint, the slopes of log h over alpha, h = sqrt(K / eps) / alpha, of two searches."""


NEARLY_FLAT = 0.5
"""Range of log h up to which it is taken for a polynomial in alpha, as on all real steps seen; else in log alpha, where
sums of powers are nearly straight."""


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


class Ratios(Protocol):
    """A point as a search sees it."""

    @property
    def feasible(self) -> bool:
        """Whether every KL / budget is at most 1."""

    @property
    def ratios(self) -> Mapping[str, float]:
        """KL / budget by constraint."""


P = TypeVar("P", bound=Ratios)

Realised: TypeAlias = "Callable[[Sequence[float]], list[float]]"
"""alphas -> which part of the update rounding leaves of each."""


@dataclass(frozen=True)
class Found:
    """One evaluated alpha and the square roots of its KL / budget ratios, by constraint."""

    alpha: float
    roots: Mapping[str, float]
    feasible: bool

    @property
    def largest(self) -> float:
        """max_j sqrt(K_j / eps_j)."""
        return max(self.roots.values(), default=math.nan)


class _Step(NamedTuple):
    asked: float
    """alpha."""
    realised: float
    """What rounding makes of it."""


class Bracket:
    """The evaluated points, and the interval that the largest feasible alpha lies in."""

    def __init__(self, at_one: Found, slopes: Mapping[str, float], at_zero: Mapping[str, float] | None = None) -> None:
        self.found, self.slopes = [at_one], slopes
        self.starts = {name: math.sqrt(ratio) for name, ratio in (at_zero or {}).items() if ratio > 0}
        """sqrt(K / eps) at alpha = 0 of the constraints that do not begin at 0: caps on the drift."""
        self.low, self.high = 0.0, 1.0
        self.asked = (0.0, 1.0)
        """The alphas that were asked for to get there: other ones where rounding leaves another part of a step."""
        self.halved = False

    def add(self, found: Found, asked: float) -> None:
        """Narrow the interval by a point that was audited."""
        self.found.append(found)
        self.narrow(found.alpha, found.feasible)
        low, high = self.asked
        self.asked = (max(low, asked), high) if found.feasible else (low, min(high, asked))

    def narrow(self, alpha: float, feasible: bool) -> None:
        """Narrow the interval by what is known of an alpha."""
        width = self.high - self.low
        if feasible:
            self.low = max(self.low, alpha)
        else:
            self.high = min(self.high, alpha)
        self.halved = self.high - self.low <= 0.5 * width

    def closed(self, tol: float) -> bool:
        """Whether the best feasible alpha is within ``tol`` of any alpha that could still be feasible."""
        return self.low > 0 and self.low >= (1 - tol) * self.high

    @property
    def middle(self) -> float:
        """Where bisection goes."""
        return 0.5 * (self.low + self.high)


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
        return _model_alpha(bracket, tol)
    if search == "backtrack" and bracket.low == 0:
        return 0.5 * bracket.high
    return bracket.middle


def model_is_done(bracket: Bracket, tol: float) -> bool:
    """Whether the best feasible alpha is within ``tol`` by the slope of the measured curve.

    With r = sqrt(K_j / eps_j) at the best alpha, and r growing at least like
    alpha^e, the largest feasible alpha is at most alpha r^(-1/e). e is the
    smallest slope of log r over log alpha that was seen from there, at most 1:
    for K ~ alpha² it is 1. On a curve that is flat and then jumps this can be
    wrong; ``strict`` waits for an infeasible alpha within ``tol`` instead.
    """
    feasible = [found for found in bracket.found if found.feasible and found.largest > 0]
    if not feasible:
        return False
    best = max(feasible, key=lambda found: found.alpha)
    others = [found for found in bracket.found if found.alpha != best.alpha]
    return any(
        _is_at_the_cap(bracket, name, best.alpha, tol)
        if name in bracket.starts
        else _is_done(name, root, best, others, tol)
        for name, root in best.roots.items()
        if root > 0
    )


def no_room(bracket: Bracket, min_alpha: float) -> bool:
    """Whether theta_t sits on a cap and the step leads outwards: the parabola passes the cap before ``min_alpha``."""
    ends = [_end(bracket, name) for name in bracket.starts]
    return bracket.low == 0 and any(end is not None and end < min_alpha for end in ends)


def _is_at_the_cap(bracket: Bracket, name: str, alpha: float, tol: float) -> bool:
    """Whether the parabola passes the cap within ``tol`` of this alpha."""
    end = _end(bracket, name)
    return end is not None and alpha >= (1 - tol) * end


def _end(bracket: Bracket, name: str) -> float | None:
    """Where the parabola through three points, theta_t among them, passes the cap; None with fewer points."""
    return _solve(_cap_curve(bracket, name), bracket, 1.0) if len(_known(bracket, name)) > 1 else None


def _is_done(name: str, root: float, best: Found, others: list[Found], tol: float) -> bool:
    """Whether this one constraint rules out a larger alpha: others say nothing about its slope."""
    known = [(other.alpha, other.roots.get(name, 0.0)) for other in others]
    slopes = [
        (math.log(root) - math.log(there)) / (math.log(best.alpha) - math.log(alpha))
        for alpha, there in known
        if there > 0 and math.isfinite(there)
    ]
    slope = min([1.0, *slopes])
    return slope > 0 and -math.log(root) <= slope * -math.log1p(-tol)


def _model_alpha(bracket: Bracket, tol: float) -> float:
    """Where the model puts the largest feasible alpha, a little on the feasible side.

    For each constraint j, log h_j = log sqrt(K_j / eps_j) - log alpha is
    nearly a straight line in alpha, and a flat one: interpolate it through the
    nearest points and solve sqrt(K_j / eps_j) = 1 - tol/2; the smallest
    solution is the answer. A remembered slope is taken off before, and added
    again.
    """
    names = {name for found in bracket.found for name, root in found.roots.items() if root > 0}
    aims = [_aim(bracket, name, tol) for name in names]
    alpha = min((aim for aim in aims if aim is not None), default=bracket.middle)
    if bracket.low == 0 and (len(bracket.found) > 1) != bool(bracket.starts):
        alpha = max(alpha, BOLDEST * bracket.high)  # a slope measured far away; a cap that theta_t sits on
    # An aim at an end of the bracket would tell nothing new; one a tolerance inside of it closes the bracket.
    low, high = (1 + 0.9 * tol) * bracket.low, (1 - 0.5 * tol) * bracket.high
    return min(max(alpha, low), high) if low < high else bracket.middle


def _aim(bracket: Bracket, name: str, tol: float) -> float | None:
    """The alpha at which one constraint would just be met."""
    start = bracket.starts.get(name)
    if start is None:
        return _solve(_curve(bracket, name), bracket, 1 - tol / 2)
    return _solve(_cap_curve(bracket, name), bracket, 1 - tol / 2 * (1 - min(start, 1.0)))


def _known(bracket: Bracket, name: str) -> list[tuple[float, float]]:
    """Where one constraint was measured, and its sqrt(K / eps) there; the nearest to the bracket first."""
    known = [(found.alpha, root) for found in bracket.found if math.isfinite(root := found.roots.get(name, math.nan))]
    return sorted(known, key=lambda point: abs(math.log(point[0]) - math.log(bracket.middle)))


def _cap_curve(bracket: Bracket, name: str) -> Callable[[float], float] | None:
    """Log sqrt(drift / cap) as a function of alpha, for a drift that begins at what theta_t has.

    A parabola through theta_t and two more points. With one alone its root is
    taken for a straight line, as if the step led straight away from pi_ref:
    where it does not, that is on the feasible side.
    """
    start, known = bracket.starts[name], _known(bracket, name)
    if not known:
        return None
    if len(known) == 1:
        (alpha, root) = known[0]
        return lambda at: _log(start + (root - start) * at / alpha)
    points = [(0.0, start**2), *((alpha, root**2) for alpha, root in known[:2])]
    return lambda at: 0.5 * _log(_lagrange(points, at))


def _log(value: float) -> float:
    return math.log(max(value, 1e-300))


def _curve(bracket: Bracket, name: str) -> Callable[[float], float] | None:
    """Log sqrt(K / eps) as a function of alpha, from the three informative points nearest to the bracket."""
    slope = bracket.slopes.get(name, 0.0)
    known = [
        (found.alpha, math.log(root) - math.log(found.alpha) - slope * found.alpha)
        for found in bracket.found
        if math.isfinite(root := found.roots.get(name, math.nan)) and root > 0
    ]
    if not known:
        return None
    known.sort(key=lambda point: abs(math.log(point[0]) - math.log(bracket.middle)))
    points = known[:3]
    if max(h for _, h in points) - min(h for _, h in points) <= NEARLY_FLAT:
        return lambda alpha: math.log(alpha) + slope * alpha + _lagrange(points, alpha)
    points = [(math.log(alpha), h) for alpha, h in points]
    return lambda alpha: math.log(alpha) + slope * alpha + _lagrange(points, math.log(alpha))


def _lagrange(points: list[tuple[float, float]], x: float) -> float:
    total = 0.0
    for i, (x_i, y_i) in enumerate(points):
        weight = 1.0
        for j, (x_j, _) in enumerate(points):
            if j != i:
                weight *= (x - x_j) / (x_i - x_j)
        total += weight * y_i
    return total


def _solve(curve: Callable[[float], float] | None, bracket: Bracket, target: float) -> float | None:
    """The alpha in the bracket where the curve passes log(target), by bisection of a formula: no audits."""
    if curve is None:
        return None
    low, high = bracket.low or 1e-9 * bracket.high, bracket.high
    if curve(high) < math.log(target):
        return high  # another constraint made this end infeasible
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if curve(middle) < math.log(target) else (low, middle)
    return 0.5 * (low + high)
