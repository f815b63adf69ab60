"""Searches as objects: the same as the strings, with their own options; controllers are values."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from step_optim import Budget, Gate, Interpolate, Project, STEPOptimizer
from step_optim.controllers import Backtracking, Bisection, Controller, ModelSearch, Search
from tests.strategies import bits, token_problem


@pytest.mark.parametrize(
    ("by_name", "by_object"),
    [
        (Interpolate(), Interpolate(ModelSearch())),
        (Interpolate(strict=True, memory=False), Interpolate(search=ModelSearch(strict=True, memory=False))),
        (Interpolate("model", tol=0.2, max_trials=5, min_alpha=0.01), Interpolate(ModelSearch(0.2, 5, 0.01))),
        (Interpolate("bisect", tol=0.1), Interpolate(Bisection(tol=0.1))),
        (Interpolate("backtrack", tol=0.5), Interpolate(Backtracking(tol=0.5))),
    ],
)
def test_a_name_and_an_object_make_the_same_run(by_name, by_object) -> None:
    """Trials, records and weights are the same."""
    assert by_name.line == by_object.line
    runs = []
    for controller in (by_name, by_object):
        problem = token_problem(3)
        optimizer = STEPOptimizer(problem.optimizer, kl=problem.kl, budget=Budget(mean=1e-4), controller=controller)
        records = []
        for step in range(3):
            problem.backward(step)
            optimizer.step()
            records.append({**optimizer.last.to_dict(), "seconds": None})
        runs.append((records, [bits(p) for p in problem.model.parameters()]))
        assert any(record["triggered"] for record in records)
    assert runs[0] == runs[1]


def test_options_belong_to_one_of_them() -> None:
    """An option beside a search object is refused, and the message says where it belongs."""
    with pytest.raises(ValueError, match=r"tol=0\.5 stands beside search=ModelSearch\(.*give them to the search alone"):
        Interpolate(ModelSearch(), tol=0.5)
    with pytest.raises(TypeError, match="use ModelSearch, Bisection or Backtracking"):
        Search()
    assert repr(Interpolate(ModelSearch(tol=0.1))).count("tol=") == 1
    with pytest.raises(ValueError, match="unknown; use one of"):
        Interpolate("newton")
    for wrong in ({"tol": 1.0}, {"max_trials": 0}, {"min_alpha": 1.0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
            ModelSearch(**wrong)


@pytest.mark.parametrize("make", [Gate, lambda: Gate(patience=2), Interpolate, lambda: Project(steps=1)])
def test_controllers_are_values(make) -> None:
    """They compare equal, can be hashed, copied and pickled, and nothing of a run is kept in them."""
    controller = make()
    assert controller == make()
    assert len({controller, make(), copy.deepcopy(controller), pickle.loads(pickle.dumps(controller))}) == 1
    assert Gate(patience=1) != Gate(patience=2)
    with pytest.raises(AttributeError):
        controller.on_reject = "keep_state"
    before = repr(controller)
    for _ in range(2):  # two optimizers share it
        problem = token_problem(1)
        optimizer = STEPOptimizer(problem.optimizer, kl=problem.kl, budget=Budget(mean=1e-5), controller=controller)
        problem.backward(0)
        optimizer.step()
        assert optimizer.last.triggered
    assert (controller, repr(controller)) == (make(), before)


def test_options_are_checked_in_a_subclass_too() -> None:
    """Whoever constructs it: the base class knows its options."""

    class Wrong(Controller):
        on_reject = "keep"

        def decide(self, trial):
            return trial.reject()

    class Misspelt(Controller):
        on_rejct = "keep_state"

        def decide(self, trial):
            return trial.reject()

    with pytest.raises(ValueError, match=r"Wrong\.on_reject='keep' is unknown"):
        Wrong().check_options()
    with pytest.raises(ValueError, match=r"Misspelt\.on_rejct='keep_state'.*if on_reject is meant"):
        STEPOptimizer(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0), budget=1.0, controller=Misspelt())
