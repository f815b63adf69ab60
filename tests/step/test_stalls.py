"""Steps that are rejected in a row: who is told when, which constraint bound, and what helps in that case."""

from __future__ import annotations

import math
import re
import warnings

import pytest
import torch
from torch import nn

from step_optim import (
    Action,
    Budget,
    Controller,
    Gate,
    GateStalled,
    Interpolate,
    Movement,
    PolicyKL,
    Project,
    STEPOptimizer,
    Trial,
    read_log,
    summarise,
)
from step_optim.__main__ import main
from step_optim.telemetry.alerts import STALL


class Run:
    """A softmax policy that one gradient moves along; KL closures that own their reference."""

    def __init__(
        self, budget: Budget | float, controller: Controller | None = None, lr: float = 3.0, **options
    ) -> None:
        torch.manual_seed(0)
        self.policy, observations = nn.Linear(3, 4), torch.eye(3)
        self.kl = PolicyKL(lambda: self.policy(observations), slices={"left": [0], "right": [1, 2]})
        self.inner = torch.optim.SGD(self.policy.parameters(), lr=lr)
        self.optimizer = STEPOptimizer(self.inner, kl=self.kl, budget=budget, controller=controller, **options)
        self.gradient = -torch.eye(4, 3)

    def steps(self, count: int) -> list[str]:
        """Take some; what was told of stalls."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(count):
                self.policy.weight.grad = self.gradient.clone()
                self.optimizer.step()
        return [str(warning.message) for warning in caught]


class Halve(Controller):
    """One half, or nothing: a controller of a user's own."""

    def decide(self, trial: Trial):
        half = trial.at(0.5)
        return trial.accept(half) if half.feasible else trial.reject()


@pytest.mark.parametrize("controller", [Gate, lambda: Interpolate(max_trials=1), lambda: Project(max_trials=1), Halve])
def test_every_controller_is_told_of_five_fifty_and_not_in_between(controller) -> None:
    """One warning for each streak at 5, and again at 50; a commit ends the streak."""
    run = Run(0.0, controller())
    assert len(run.steps(STALL - 1)) == 0
    assert len(run.steps(44)) == 1
    (text,) = run.steps(3)
    assert text.startswith("50 steps in a row were rejected, by the budget of the mean.")
    run.optimizer.budget = 100.0
    assert run.steps(1) == []
    run.optimizer.budget = 0.0
    assert run.steps(STALL - 1) == []
    (text,) = run.steps(1)
    assert text.startswith("5 steps in a row were rejected")


def test_a_patience_that_lasts_is_not_told_of() -> None:
    """A gate that shrinks by itself after n rejections does what it was asked to."""
    run = Run(1e-4, Gate(patience=12))
    assert run.steps(30) == []
    assert run.optimizer.summary()["shrinks"] == 2


def test_a_gate_over_the_mean_names_figures_and_a_rate_that_works() -> None:
    """The rate that the text asks for is feasible: K grows like its square."""
    run = Run(1e-3, Gate(), lr=0.3)
    (text,) = run.steps(STALL)
    moved = run.optimizer.last.candidate.mean
    assert f"The last proposal moved {moved:.3g} nats per token, and 0.001 are allowed" in text
    factor = float(text.split("by about ")[1].split(" times")[0])
    assert factor == pytest.approx(math.sqrt(moved / 1e-3), rel=0.01)
    for remedy in ("raise the budget", "adaptive_rate=True", "Interpolate()"):
        assert remedy in text
    run.inner.param_groups[0]["lr"] = 0.3 / (1.1 * factor)
    assert run.steps(1) == []
    assert run.optimizer.last.action is Action.COMMIT


def test_a_slice_is_named_with_its_own_figures() -> None:
    """Not the mean's, which may be well within its budget."""
    run = Run(Budget(mean=10.0, slices={"right": 1e-5}), Gate())
    (text,) = run.steps(STALL)
    assert "by the budget of slice 'right'" in text
    assert f"moved {run.optimizer.last.candidate.slices['right']:.3g} nats per token, and 1e-05 are allowed" in text
    assert run.optimizer.summary()["bound"] == {"slice:right": STALL}


def test_at_the_cap_smaller_steps_are_not_recommended() -> None:
    """A policy that drifts up to its cap and stays: how far it is, and what helps there."""
    run = Run(Budget(mean=math.inf, reference=0.05), Interpolate(), lr=0.5)
    texts = run.steps(40)
    assert texts
    drift = run.optimizer.last.reference_drift.mean
    assert "by the cap on the drift from pi_ref" in texts[0]
    assert f"the cap is 0.05, and the policy before the step is {drift:.3g} from it" in texts[0]
    for words in ("Smaller steps cannot help", "Budget(drift=...)", "KL penalty", "earlier checkpoint"):
        assert words in texts[0]
    for words in ("learning rate", "adaptive_rate", "Interpolate()"):
        assert words not in texts[0]


def test_below_the_cap_a_gate_that_jumps_over_it_is_told_to_take_smaller_steps() -> None:
    """There is room, and no proposal is short enough for it."""
    run = Run(Budget(mean=math.inf, reference=0.05), Gate(), lr=5.0)
    (text,) = run.steps(STALL)
    assert "the policy before the step is 0 from it: there is room" in text
    assert "Lower the learning rate, or shrink with Interpolate()" in text


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_updates_that_are_not_finite_are_a_case_of_their_own(bad) -> None:
    """Neither a budget nor a smaller rate is the cure."""
    run = Run(1e-3, Gate())
    run.gradient[0, 0] = bad
    (text,) = run.steps(STALL)
    assert "by an update or a KL that is not finite" in text
    assert "clip_grad_norm_" in text
    assert "GradScaler" in text
    assert "learning rate" not in text
    assert run.optimizer.summary()["bound"] == {"not finite": STALL}


def test_a_kl_that_is_not_finite_is_told_apart_from_such_an_update() -> None:
    """The weights are fine, and the closure is what to look at."""
    run = Run(1e-3, Gate())
    run.optimizer.bind(lambda: math.nan)
    (text,) = run.steps(STALL)
    assert "The last update was finite, and its KL was not" in text


def test_what_bound_in_turns_is_counted() -> None:
    """The text says how often each constraint bound the latest rejections."""
    run = Run(1e-9, Gate())
    run.steps(3)
    run.optimizer.budget = Budget(mean=1.0, slices={"left": 1e-9})
    (text,) = run.steps(2)
    assert "the last 5 by the budget of the mean (3), the budget of slice 'left' (2)." in text


def test_where_a_search_ended_too_early_it_may_go_on() -> None:
    """A KL that falls with alpha as it should is no sign of a wrong closure, nor of rounding."""
    run = Run(Budget(mean=1.0, slices={"left": 1e-9}), Interpolate(max_trials=2), lr=30.0)
    (text,) = run.steps(STALL)
    least = min(run.optimizer.last.trials, key=lambda trial: trial.alpha)
    assert f"(alpha = {least.alpha:.3g}) read {least.movement.slices['left']:.3g}: KL falls with alpha" in text
    assert "max_trials, min_alpha" in text
    assert "rounding" not in text


def test_where_no_part_of_a_step_is_feasible_the_smallest_that_was_tried_is_named() -> None:
    """The text tells what a function reads where nothing has moved, and that this is 0 for other closures."""
    run = Run(1e-9, Interpolate())
    moved, members = run.kl._movements, run.kl.members
    run.kl._movements = lambda *policies: [
        Movement.over([kl + 1e-3 for kl in found.prompts], members)  # rounding, say
        for found in moved(*policies)
    ]
    (text,) = run.steps(STALL)
    assert "(alpha = 0.0001) read 0.001, and its movement at the weights before the step is 0 by definition" in text
    assert "its rounding is above the budget" in text
    run = Run(1e-3, Interpolate())
    run.optimizer.bind(lambda: 0.25)
    fixed, text = run.steps(STALL)
    assert "seems to measure from a fixed reference" in fixed
    assert "(alpha = 0.0001) read 0.25, and the KL function reads 0.25 at the weights before the step" in text


@pytest.mark.parametrize("search", ["model", "bisect"])
def test_a_step_that_the_dtype_cannot_hold_is_named(search) -> None:
    """Every feasible part rounds to the weights before the step."""
    weight, before = nn.Parameter(torch.ones(4, dtype=torch.bfloat16)), torch.ones(4)
    optimizer = STEPOptimizer(
        torch.optim.SGD([weight], lr=1.0),
        kl=lambda: (weight.float() - before).abs().sum(),
        budget=1e-6,
        controller=Interpolate(search),
    )
    weight.grad = torch.full((4,), -0.0078125, dtype=torch.bfloat16)
    for _ in range(STALL - 1):
        optimizer.step()
    with pytest.warns(UserWarning, match="5 steps in a row") as caught:
        optimizer.step()
    assert re.search(
        "(?i)in the dtype of the weights (it|no smaller part of it) is (no|a) step", str(caught[0].message)
    )


def test_a_budget_of_zero_is_named() -> None:
    """No rate is small enough for it."""
    (text,) = Run(0.0, Gate()).steps(STALL)
    assert "a budget of 0 lets no movement through" in text


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        (1e-9, "by the budget of the mean"),
        (Budget(slices={"left": 1e-9}), "by the budget of slice 'left'"),
        (Budget(reference=1e-9), "by the cap on the drift from pi_ref"),
    ],
)
def test_a_stalled_gate_raises_the_same_text(budget, words) -> None:
    """`GateStalled` has the constraint, the figures and the remedies, and everything is as before the step."""
    run = Run(budget, Gate(patience=2, on_stall="raise"))
    run.steps(2)
    before = run.policy.weight.detach().clone()
    with pytest.raises(GateStalled, match=f"2 steps in a row were rejected, {words}") as caught:
        run.steps(1)
    assert "The last proposal" in str(caught.value)
    assert torch.equal(run.policy.weight, before)


def test_a_stalled_gate_looks_at_a_function_too() -> None:
    """One that measures from the start of training is found, also where the gate raises."""
    run = Run(1e-3, Gate(patience=3, on_stall="raise"), lr=0.01)
    fixed = [False]
    run.optimizer.bind(lambda: 0.25 if fixed[0] else 0.0)
    assert run.steps(3) == []
    fixed[0] = True
    with warnings.catch_warnings(record=True) as caught, pytest.raises(GateStalled):
        warnings.simplefilter("always")
        for _ in range(4):
            run.policy.weight.grad = run.gradient.clone()
            run.optimizer.step()
    assert ["fixed reference" in str(warning.message) for warning in caught] == [True]


def test_constraints_are_counted_over_checkpoints_and_logs(tmp_path, capsys) -> None:
    """`summary()["bound"]`, a resumed run's, a log's and the command line's are one figure; old checkpoints load."""
    path = tmp_path / "run.jsonl"
    run = Run(1e-9, Gate(), log=path)
    run.steps(3)
    run.optimizer.budget = Budget(mean=1.0, slices={"left": 1e-9})
    run.steps(2)
    run.optimizer.budget = 100.0
    run.steps(1)
    counted = {"mean": 3, "slice:left": 2}
    assert run.optimizer.summary()["bound"] == counted
    assert summarise(read_log(path))["bound"] == counted
    saved = run.optimizer.state_dict()
    assert all(type(value) is float for value in saved["step_optim"]["summary"].values())
    again = Run(1e-9, Gate())
    again.optimizer.load_state_dict(saved)
    again.steps(1)
    assert again.optimizer.summary()["bound"] == {"mean": 4, "slice:left": 2}
    old = {name: value for name, value in saved["step_optim"]["summary"].items() if not name.startswith("bound:")}
    again.optimizer.load_state_dict(saved | {"step_optim": saved["step_optim"] | {"summary": old}})
    assert again.optimizer.summary()["bound"] == {}
    assert main(["summary", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "bound by mean              3\n" in printed
    assert "bound by slice:left        2\n" in printed
