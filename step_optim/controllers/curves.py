"""Models of how KL grows on the way to the candidate: K nearly as alpha², a drift that begins above 0 as a parabola."""

from __future__ import annotations

import math
from collections.abc import Callable

from step_optim.controllers.bracket import Bracket, Found

BOLDEST = 0.1
"""Smallest part of the bracket's upper end that a measured slope may jump to while nothing feasible is known."""

NEARLY_FLAT = 0.5
"""Range of log h up to which it is taken for a polynomial in alpha, as on all real steps seen; else in log alpha, where
sums of powers are nearly straight."""


def model_is_done(bracket: Bracket, tol: float) -> bool:
    """Whether the best feasible alpha is within ``tol`` by the slope of the measured curve.

    With r = sqrt(K_j / eps_j) at the best alpha, and r growing at least like
    alpha^e, the largest feasible alpha is at most alpha r^(-1/e). e is the
    smallest slope of log r over log alpha that was seen from there, at most 1:
    for K ~ alpha² it is 1. Where none was seen, since all else was not finite,
    nothing is ruled out. On a curve that is flat and then jumps this can be
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
    if not slopes:
        return False  # K was measured at this alpha alone, and may grow more slowly than alpha²
    slope = min([1.0, *slopes])
    return slope > 0 and -math.log(root) <= slope * -math.log1p(-tol)


def model_alpha(bracket: Bracket, tol: float) -> float:
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
