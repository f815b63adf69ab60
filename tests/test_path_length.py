"""What a cap on the path has left, held against exact fractions."""

from __future__ import annotations

import math
import random
from fractions import Fraction

from hypothesis import example, given
from hypothesis import strategies as st

from step_optim.limits import Limits
from step_optim.movement import Movement
from step_optim.path_length import NOTHING, PathLength

sizes = st.floats(0, 10) | st.floats(-12, 1).map(lambda exponent: 10.0**exponent)


@given(own=sizes, before=st.lists(sizes, max_size=3), cap=sizes)
@example(own=0.3996142915398079, before=[0.16631840655550295], cap=0.8704712321086546)  # rounds up
def test_what_is_left_never_leads_beyond_the_cap(own, before, cap) -> None:
    """As floats add up; and next to nothing of it is given away."""
    earlier = PathLength()
    for each in before:
        earlier = earlier.plus(PathLength(each, {"a": each}))
    path = PathLength(own, {"a": own}, before=earlier)
    left = path.left(cap)
    assert left == path.left(cap, "a")
    assert left >= 0
    exact = Fraction(cap) - Fraction(own) - sum(map(Fraction, before))
    if left == 0:
        assert exact <= NOTHING * cap + 8 * math.ulp(max(cap, 1.0))
    else:
        assert earlier.mean + (own + left) <= cap
        assert abs(Fraction(left) - exact) <= 8 * math.ulp(cap)


def test_no_sum_rounds_up_beyond_the_cap() -> None:
    """About one in a hundred would: cap - own is rounded, and so is their sum."""
    draw = random.Random(0)
    for _ in range(3000):
        cap = draw.random()
        own = draw.random() * cap
        before = draw.random() * (cap - own)
        assert own + PathLength(own).left(cap) <= cap
        assert before + (own + PathLength(own, before=PathLength(before)).left(cap)) <= cap


@given(cap=sizes.filter(bool), parts=st.lists(st.floats(0, 1), max_size=40), eps=sizes)
def test_steps_as_long_as_they_may_be_end_at_the_cap(cap, parts, eps) -> None:
    """A step takes any part of its limit; in the end there is nothing left."""
    path = PathLength()
    for part in [*parts, *[1.0] * 3]:
        limits = Limits(mean=eps, path=cap).after(path)
        assert limits.mean == min(eps, path.left(cap))
        path = PathLength(path.mean + part * limits.mean)
        assert path.mean <= cap
    if eps >= cap:
        assert Limits(mean=eps, path=cap).after(path).used_up == ("mean",)


@given(cap=sizes, spent=sizes, eps=sizes, moved=sizes)
def test_lowered_limits_are_told_as_the_path(cap, spent, eps, moved) -> None:
    """The constraint keeps its name in verdicts, and has another one in records."""
    limits = Limits(slices={"a": eps}, path_slices={"a": cap, "b": cap}).after(PathLength(0.0, {"a": spent}))
    lowered = limits.slices["a"] < eps
    assert ("slice:a" in limits.lowered) == lowered
    assert limits.told("slice:a") == ("path:a" if lowered else "slice:a")
    assert limits.told("slice:b") == "path:b"
    assert limits.slices["b"] == cap
    assert (limits.mean, limits.told("mean"), limits.of("path:a")) == (math.inf, "mean", cap)
    movement = Movement(moved, {"a": moved, "b": 0.0})
    assert limits.judge(movement).feasible == (moved <= limits.slices["a"])
    assert limits.reading("path:a", movement) == moved
    assert limits.reading("path:b", movement) == 0.0
