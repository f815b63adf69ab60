"""`check_optimizer` tells good optimizers from bad ones, and the optimizers of others are what the table says."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from step_optim import Interpolate, STEPOptimizer
from step_optim.testing import check_optimizer

EXAMPLES = Path(__file__).parent.parent / "examples"


class Plain(torch.optim.Optimizer):
    """SGD, for others to spoil."""

    def __init__(self, params, lr: float = 0.5) -> None:
        super().__init__(params, {"lr": lr})

    def rate(self) -> float:
        return 1.0

    def after(self, p: torch.Tensor) -> None:
        """Do more than SGD."""

    @torch.no_grad()
    def step(self, closure=None, **more):
        rate = self.rate()
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad, alpha=group["lr"] * rate)
                self.after(p)


class InSlots(Plain):
    """Counts its steps where no rollback looks: in an object without a dictionary."""

    class Counter:
        """One number."""

        __slots__ = ("value",)

    def __init__(self, params) -> None:
        super().__init__(params)
        self.counter = self.Counter()
        self.counter.value = 0

    def rate(self) -> float:
        self.counter.value += 1
        return 1 / self.counter.value


class InAClosure(Plain):
    """Counts its steps in a variable of a function."""

    def __init__(self, params) -> None:
        super().__init__(params)
        count = 0

        def rate() -> float:
            nonlocal count
            count += 1
            return 1 / count

        self.decay = rate

    def rate(self) -> float:
        return self.decay()


class Average(Plain):
    """Pulls the weights to their running average, which it keeps in its state."""

    def after(self, p: torch.Tensor) -> None:
        average = self.state[p].setdefault("average", p.detach().clone())
        average.lerp_(p, 0.5)
        p.copy_(average)


class FromSums(Plain):
    """Keeps no weights, but computes them from the first ones and the sum of gradients."""

    def after(self, p: torch.Tensor) -> None:
        state = self.state[p]
        if not state:
            state.update(start=(p + 0.5 * p.grad).square(), sign=(p + 0.5 * p.grad).sign(), sum=torch.zeros_like(p))
        state["sum"].add_(p.grad.abs() * p.grad)
        p.copy_(state["start"].sqrt() * state["sign"] - state["sum"].abs().sqrt() * state["sum"].sign())


class Elsewhere(Plain):
    """Moves the weights when gradients are reset."""

    @torch.no_grad()
    def zero_grad(self, set_to_none: bool = True) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(0.9)
        super().zero_grad(set_to_none)


class Lazy(Plain):
    """Moves nothing."""

    def rate(self) -> float:
        return 0.0


class Broken(Plain):
    """Raises in its second step."""

    def after(self, p: torch.Tensor) -> None:
        self.state[p]["seen"] = self.state[p].get("seen", 0) + 1
        if self.state[p]["seen"] == 2:
            raise ArithmeticError("no second step")


class Forgetful(Plain):
    """Does not find its state where it saves it; that is its own affair, not the wrapper's."""

    def after(self, p: torch.Tensor) -> None:
        self.memory = {**getattr(self, "memory", {}), id(p): 1}
        if self.state[p]:
            p.add_(self.state[p]["last"], alpha=0.1)
        self.state[p]["last"] = p.grad.clone()

    def state_dict(self):
        return {**super().state_dict(), "state": {}}


LOMO = type("LOMO", (Plain,), {})


def test_a_good_optimizer_is_exact_in_everything():
    """All figures of the verdict, and its text."""
    verdict = check_optimizer(Plain)
    assert verdict.exact
    assert (verdict.bare, verdict.refused, verdict.shrink, verdict.restep, verdict.needs) == ("", "", "", "", ())
    assert verdict.sticks == pytest.approx(1, abs=1e-5)
    assert str(verdict).startswith("Plain, float32: exact\n")


@pytest.mark.parametrize(
    ("factory", "part", "words"),
    [
        (InSlots, "rollback", "counter.value differs"),
        (InAClosure, "rollback", "decay.count differs"),
        (Elsewhere, "rollback", "weights move outside step()"),
        (Broken, "bare", "ArithmeticError: no second step"),
        (Lazy, "bare", "no step moves a weight"),
        (LOMO, "refused", "inside the backward pass"),
        (lambda parameters: object(), "bare", "AttributeError"),
    ],
)
def test_what_is_wrong_is_found_and_named(factory, part, words):
    """State that no rollback reaches, movement outside of step(), failures: not exact, and told why."""
    verdict = check_optimizer(factory)
    assert not verdict.exact
    assert words in getattr(verdict, part)
    assert words in str(verdict)
    assert all(not getattr(verdict, other) for other in {"bare", "refused", "rollback"} - {part})


def test_copies_of_the_weights_are_found_and_moved_along_once_they_are_known():
    """The stick test names the state key; with it, half a step stays half a step."""
    verdict = check_optimizer(Average)
    assert verdict.exact
    assert verdict.needs == ("average",)
    assert "shrink needs param_like=('average',)" in verdict.headline
    told = check_optimizer(Average, param_like="average")
    assert told.headline == "exact; shrink moves state ('average',) along"
    assert told.shrink_sticks > 0.99


def test_weights_that_are_computed_anew_cannot_be_shrunk():
    """No state that could be moved along helps: the verdict says so."""
    verdict = check_optimizer(FromSums)
    assert verdict.exact
    assert "do not shrink by interpolation" in verdict.headline


def test_an_optimizer_that_cannot_be_saved_is_told_from_a_wrapper_that_cannot():
    """What differs from the uninterrupted bare run is the optimizer's fault if the bare resumed run differs, too."""
    verdict = check_optimizer(Forgetful)
    assert verdict.exact
    assert "bare" in verdict.bare_round_trip
    assert verdict.bare_round_trip in str(verdict)


def test_checks_leave_the_random_streams_alone():
    """A user calls it in the middle of something."""
    before = torch.get_rng_state()
    check_optimizer(torch.optim.SGD)
    assert torch.equal(torch.get_rng_state(), before)


def test_known_optimizers_without_a_line_refuse_to_interpolate():
    """The error says why, and what to use instead; restep and a plain gate are taken."""
    import pytorch_optimizer

    from step_optim import Gate

    def make():
        return pytorch_optimizer.FTRL([torch.nn.Parameter(torch.ones(3))], lr=0.1)

    with pytest.raises(ValueError, match=r"FTRL computes the weights anew.*shrink='restep'"):
        STEPOptimizer(make(), kl=lambda: 0.0, budget=1.0, controller=Interpolate())
    STEPOptimizer(make(), kl=lambda: 0.0, budget=1.0, shrink="restep")
    STEPOptimizer(make(), kl=lambda: 0.0, budget=1.0, controller=Gate())


@pytest.fixture
def table(monkeypatch):
    """The example, imported."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import optimizer_table

    yield optimizer_table
    sys.modules.pop("optimizer_table")


def committed() -> dict[str, list[str]]:
    rows = re.findall(r"^\| (\w+\.[^|]+) \| ([^|]+) \| ([^|]+) \|", (EXAMPLES / "optimizer_table.md").read_text(), re.M)
    return {title: [float32, bfloat16] for title, float32, bfloat16 in rows}


SOME = (
    "torch.Muon",
    "torch.LBFGS",
    "bitsandbytes.AdamW8bit",
    "schedulefree.ScheduleFreeWrapper(SGD)",
    "transformers.Adafactor",
    "pytorch_optimizer.Prodigy",
    "pytorch_optimizer.Lookahead(AdamW)",
    "pytorch_optimizer.Ranger",
    "pytorch_optimizer.MADGRAD",
    "pytorch_optimizer.Kron",
    "pytorch_optimizer.LOMO",
    "pytorch_optimizer.SAM(AdamW)",
)


def check_rows(table, titles):
    found = {title: [table.cell(table.check(title, dtype)) for dtype in table.DTYPES] for title in titles}
    assert found == {title: committed()[title] for title in titles}


def test_some_optimizers_are_what_the_table_says(table):
    """Moments, line searches, 8-bit state, slow weights, preconditioners, steps in the backward pass."""
    check_rows(table, SOME)


@pytest.mark.slow
def test_all_optimizers_are_what_the_table_says(table):
    """The whole table, made again."""
    check_rows(table, table.titles())


def test_every_optimizer_that_runs_bare_is_exact(table):
    """No row of the committed table is anything but exact, refused, or of an optimizer that fails on its own."""
    rows = committed()
    assert set(rows) == set(table.titles())
    cells = [cell for row in rows.values() for cell in row]
    assert len(rows) > 200
    assert all(cell.startswith(("exact", "refused", "does not run bare")) for cell in cells)
    assert not [cell for cell in cells if "DO NOT" in cell or "param_like" in cell]
    assert sum(cell.startswith("exact") for cell in cells) > 0.9 * len(cells)
