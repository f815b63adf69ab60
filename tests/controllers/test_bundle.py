"""The nearest point inside of half-spaces, against the conditions that define it."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from step_optim.controllers.bundle import Bundle, Cut, inner, solve

NUMBERS = st.floats(-3, 3).map(lambda x: round(x, 3))
POINTS = st.lists(NUMBERS, min_size=4, max_size=4).map(lambda xs: [torch.tensor(xs[:3]), torch.tensor(xs[3:])])
CUTS = st.lists(st.tuples(POINTS, NUMBERS), min_size=1, max_size=6)


def product(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    return inner([(a, b)])[0]


def size(point: list[torch.Tensor]) -> float:
    return math.sqrt(product(point, point))


def value(cut: Cut, point: list[torch.Tensor]) -> float:
    """What a model predicts."""
    return cut.offset + product(cut.normal, point)


def nearest(target: list[torch.Tensor], cuts: list[Cut], aim: float):
    return Bundle(cuts, inner).nearest(target, dict.fromkeys([cut.name for cut in cuts], aim))


@given(target=POINTS, normal=POINTS, offset=NUMBERS)
def test_one_half_space_is_the_projection(target, normal, offset) -> None:
    """X - max(0, excess) n / ‖n‖²: the closed form."""
    if size(normal) < 0.1:
        return
    cut = Cut("drift", normal, offset)
    found, multipliers = nearest(target, [cut], aim=1.0)
    wanted = max(0.0, value(cut, target) - 1.0) / product(normal, normal)
    assert multipliers.get("drift", 0.0) == pytest.approx(wanted, rel=1e-5, abs=1e-9)
    for x, t, n in zip(found, target, normal, strict=True):
        torch.testing.assert_close(x, t - wanted * n, rtol=1e-4, atol=1e-5)


@given(target=POINTS, given=CUTS)
def test_the_conditions_of_the_nearest_point(target, given) -> None:
    """Inside of every half-space, and a multiplier only where its edge is touched: that makes it the nearest."""
    # All of them contain the origin, so that there is a point inside.
    every = [Cut(str(i), normal, min(offset, 0.5)) for i, (normal, offset) in enumerate(given)]
    cuts = [cut for cut in every if size(cut.normal) >= 0.3]
    found, multipliers = nearest(target, cuts, aim=1.0)
    slack = 1e-3 * (1 + size(target))
    for cut in cuts:
        assert value(cut, found) <= 1.0 + slack
        if cut.name in multipliers:
            assert multipliers[cut.name] > 0
            assert value(cut, found) == pytest.approx(1.0, abs=slack)


@given(target=POINTS, given=CUTS)
def test_a_point_inside_stays(target, given) -> None:
    """Where no model is above the aim nothing moves, to the bit."""
    cuts = [Cut("drift", normal, offset) for normal, offset in given]
    aim = max(value(cut, target) for cut in cuts) + 1e-6
    found, multipliers = nearest(target, cuts, aim)
    assert multipliers == {}
    assert all(torch.equal(x, t) for x, t in zip(found, target, strict=True))


def test_the_same_half_space_twice_changes_nothing() -> None:
    """The Gram matrix is singular then."""
    normal, target = [torch.tensor([1.0, 2.0, 2.0])], [torch.tensor([3.0, 0.0, 0.0])]
    once, one = nearest(target, [Cut("drift", normal, 0.0)], 1.0)
    twice, two = nearest(target, [Cut("drift", normal, 0.0), Cut("drift", normal, 0.0)], 1.0)
    assert two == pytest.approx(one, rel=1e-4)
    torch.testing.assert_close(once, twice, rtol=1e-4, atol=1e-4)


def test_a_model_above_a_measurement_is_lowered_to_it() -> None:
    """And one below stays, and one of another constraint: they bound a convex function from below."""
    normal, there = [torch.tensor([2.0])], [torch.tensor([1.0])]
    bundle = Bundle([Cut("drift", normal, 0.0), Cut("drift", normal, -1.0), Cut("mean", normal, 0.0)], inner)
    bundle.learn({"drift": 1.5}, there)
    assert [value(cut, there) for cut in bundle.cuts] == [1.5, 1.0, 2.0]


def test_a_model_is_exact_where_it_was_measured() -> None:
    """Its offset says so; none of them lasts, and those of a constraint can be dropped."""
    bundle, there = Bundle([], inner), [torch.tensor([1.0, -3.0])]
    for name, root in (("drift", 1.5), ("drift:a", 2.0), ("drift", 1.2)):
        bundle.add(name, [torch.tensor([2.0, 0.5])], root, there)
    assert [value(cut, there) for cut in bundle.cuts] == pytest.approx([1.5, 2.0, 1.2])
    assert bundle.lasting == []
    assert [cut.name for cut in bundle.above({"drift": 1.4, "drift:a": 1.9}, there)] == ["drift", "drift:a"]
    bundle.forget(["drift"])
    assert [cut.name for cut in bundle.cuts] == ["drift:a"]


def test_no_half_spaces_no_multipliers() -> None:
    """An empty bundle leaves the target."""
    assert solve([], []) == []
    assert nearest([torch.ones(2)], [], 1.0)[1] == {}


def test_what_is_remembered_is_the_average_as_long_as_the_newest_is_along_it() -> None:
    """E <- a E + (1 - a) n, and the model's normal E <n, E> / <E, E>; exact where it was measured; one for each cap."""
    bundle, there = Bundle([], inner), [torch.tensor([1.0, -1.0])]
    bundle.follow("drift", [torch.tensor([2.0, 0.0])], 0.3, there, 0.75)
    bundle.add("drift", [torch.tensor([5.0, 5.0])], 0.3, there)
    bundle.follow("drift", [torch.tensor([1.0, 1.0])], 0.4, there, 0.75)
    (cut,) = bundle.lasting
    mean, newest = torch.tensor([1.75, 0.25]), torch.tensor([1.0, 1.0])
    torch.testing.assert_close(cut.normal[0], mean * (newest @ mean) / (mean @ mean))
    assert cut.offset + float(cut.normal[0] @ there[0]) == pytest.approx(0.4)
    assert len(bundle.cuts) == 2


def test_directions_that_point_apart_are_not_averaged() -> None:
    bundle, there = Bundle([], inner), [torch.zeros(2)]
    bundle.follow("drift", [torch.tensor([1.0, 0.0])], 0.3, there, 0.85)
    bundle.follow("drift", [torch.tensor([-0.1, 0.01])], 0.3, there, 0.85)
    torch.testing.assert_close(bundle.lasting[0].normal[0], torch.tensor([-0.1, 0.01]))
    bundle.follow("drift", [torch.tensor([math.nan, 0.1])], 0.3, there, 0.85)  # tells nothing
    torch.testing.assert_close(bundle.lasting[0].normal[0], torch.tensor([-0.1, 0.01]))


@given(st.integers(0, 999))
def test_an_average_of_noisy_draws_is_nearer_to_the_truth(seed) -> None:
    """In direction and in slope, which one draw overestimates."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.zeros(400)
    truth[0] = 1.0
    bundle = Bundle([], inner)
    for _ in range(40):
        draw = truth + 0.07 * torch.randn(400, generator=generator)  # noise that is longer than the truth
        bundle.follow("drift", [draw], 1.0, [torch.zeros(400)], 0.85)
    normal = bundle.lasting[0].normal[0]
    assert float(normal @ truth / normal.norm()) > float(draw @ truth / draw.norm())
    assert float(normal.norm()) < 0.9 * float(draw.norm())


def test_an_average_that_the_newest_contradicts_gives_way() -> None:
    """Less of the past is kept, or nothing: a normal across the newest would be tiny, and a step along it huge."""
    bundle, there = Bundle([], inner), [torch.zeros(2)]
    bundle.follow("drift", [torch.tensor([10.0, 0.0])], 0.3, there, 0.85)
    newest = torch.tensor([0.1, 1.0])
    bundle.follow("drift", [newest], 0.3, there, 0.85)
    normal = bundle.lasting[0].normal[0]
    assert float(normal @ newest) / float(normal.norm() * newest.norm()) >= 0.3
    assert float(normal.norm()) >= 0.3 * float(newest.norm())
