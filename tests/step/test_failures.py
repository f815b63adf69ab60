"""Whatever goes wrong in between, everything is as before and the next step works."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from step_optim import Action, Budget, Controller, Gate, Interpolate, Movement, Project, Steer, STEPOptimizer
from step_optim.host import undo
from tests.strategies import INNER, Problem, picture, policy_problem, token_problem, wrap

FAILURES = [RuntimeError("boom"), KeyboardInterrupt(), torch.OutOfMemoryError("simulated"), SystemExit(3)]


class Bomb:
    """Calls a function, and raises instead at the n-th call."""

    def __init__(self, fn, at: int, error: BaseException) -> None:
        self.fn, self.at, self.error, self.calls = fn, at, error, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if self.calls == self.at:
            raise self.error
        return self.fn(*args, **kwargs)


def survives(problem: Problem, optimizer: STEPOptimizer, error: BaseException) -> None:
    """The step raises, leaves no trace, is in the record; and the same step then works."""
    before = picture(problem.model, optimizer)
    with pytest.raises(type(error)):
        optimizer.step()
    assert picture(problem.model, optimizer) == before
    assert type(error).__name__ in optimizer.last.error
    assert not optimizer.last.success
    optimizer.step()
    assert optimizer.last.error is None
    assert optimizer.last.action is not Action.UNCHANGED


@given(
    error=st.sampled_from(FAILURES),
    at=st.integers(1, 5),
    controller=st.sampled_from([Interpolate(), Interpolate("bisect"), Project(steps=1), Steer(corrections=1)]),
    inner=st.sampled_from(sorted(INNER)),
)
def test_a_failure_in_any_audit_or_trial_leaves_everything_exact(error, at, controller, inner):
    """The anchor, the candidate's audit, and every trial of a search may raise anything."""
    problem = policy_problem(8, inner=inner)
    bomb = problem.kl.fn = Bomb(problem.kl.fn, 0, error)  # not while it is wrapped, which may call it
    optimizer = wrap(problem, Budget(mean=1e-7, slices=1e-7), controller)
    problem.backward(0)
    bomb.at, bomb.calls = at, 0
    before = picture(problem.model, optimizer)
    try:
        optimizer.step()
    except BaseException as raised:
        assert raised is error  # noqa: PT017
        assert picture(problem.model, optimizer) == before
        optimizer.step()
    assert optimizer.last.error is None
    assert optimizer.last.accepted.mean <= 1e-7


@given(error=st.sampled_from(FAILURES), part=st.integers(1, 4), inner=st.sampled_from(["AdamW", "SGD", "RMSprop"]))
def test_a_failure_half_way_through_the_inner_step_leaves_everything_exact(error, part, inner):
    """An inner step that has moved some weights and made some state when it fails is undone whole."""
    problem = policy_problem(9, inner=inner)
    optimizer = wrap(problem, Budget(mean=math.inf))
    problem.backward(0)
    plain = problem.optimizer.step

    def half_way(*args, **kwargs):
        with torch.no_grad():
            for p in list(problem.model.parameters())[:part]:
                p.add_(1.0)
                problem.optimizer.state[p]["made"] = torch.ones(1)
        problem.optimizer.param_groups[0]["lr"] = 77.0
        problem.optimizer.step = plain
        raise error

    before = picture(problem.model, optimizer)
    problem.optimizer.step = half_way
    with pytest.raises(type(error)):
        optimizer.step()
    after = picture(problem.model, optimizer)
    del problem.optimizer.step, before["attributes"], after["attributes"]
    assert after == before
    optimizer.step()
    assert optimizer.last.action is Action.COMMIT


def test_adam_with_one_sparse_gradient_fails_and_leaves_no_state():
    """Adam raises at the sparse gradient after it made state for the dense one before it."""
    dense, table = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(4, 2))
    inner = torch.optim.Adam([dense, table], foreach=False)
    optimizer = STEPOptimizer(inner, kl=lambda: 0.0, budget=1.0)
    dense.grad = torch.ones(3)
    table.grad = torch.sparse_coo_tensor([[1]], torch.ones(1, 2), (4, 2), check_invariants=True)
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert not inner.state
    assert torch.equal(dense, torch.ones(3))


@given(
    value=st.sampled_from(
        [math.nan, math.inf, {"mean": 0.1, "a": math.nan}, Movement(math.inf), torch.tensor(math.nan)]
    ),
    budget=st.sampled_from([0.5, math.inf]),
    controller=st.sampled_from([Gate(), Interpolate(max_trials=3)]),
)
def test_a_kl_that_is_not_finite_never_commits(value, budget, controller):
    """NaN and inf are infeasible under any budget, the infinite one included, and the record names them."""
    problem = policy_problem(1)
    optimizer = wrap(Problem(problem.model, problem.optimizer, lambda: value, problem.batch), budget, controller)
    problem.backward(0)
    before = picture(problem.model, optimizer)
    optimizer.step()
    assert optimizer.last.action is Action.REJECT
    assert "not finite" in optimizer.last.error
    assert picture(problem.model, optimizer) == before


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (-0.1, ValueError, "never negative"),
        ({"mean": 0.1, "a": -1e-9}, ValueError, "slice 'a'"),
        (torch.zeros(3), ValueError, r"shape \(3,\)"),
        (torch.zeros(2, 2), ValueError, r"shape \(2, 2\)"),
        ("0.1", TypeError, "str"),
        (None, TypeError, "NoneType"),
        (True, TypeError, "bool"),
        ({}, ValueError, "empty mapping"),
        ({"a": [0.1]}, TypeError, "list"),
        (1 + 2j, TypeError, "complex"),
    ],
)
@pytest.mark.parametrize("on_error", ["raise", "reject"])
def test_a_kl_of_the_wrong_kind_never_commits(value, error, words, on_error):
    """Negative, wrongly shaped and wrongly typed KLs are errors that name what came; on_error decides who hears."""
    problem = policy_problem(1)
    optimizer = wrap(Problem(problem.model, problem.optimizer, lambda: value, problem.batch), 0.5, on_error=on_error)
    problem.backward(0)
    before = picture(problem.model, optimizer)
    if on_error == "raise":
        with pytest.raises(error, match=words):
            optimizer.step()
    else:
        optimizer.step()
        assert error.__name__ in optimizer.last.error
    assert optimizer.last.action is Action.REJECT
    assert picture(problem.model, optimizer) == before
    optimizer.step(kl=lambda: 0.0)
    assert optimizer.last.action is Action.COMMIT


def test_on_error_reject_lets_interrupts_through():
    """KeyboardInterrupt is never turned into a rejection."""
    problem = policy_problem(1)

    def interrupt():
        raise KeyboardInterrupt

    optimizer = wrap(Problem(problem.model, problem.optimizer, interrupt, problem.batch), 0.5, on_error="reject")
    problem.backward(0)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_update_that_is_not_finite_is_rejected_even_where_the_control_set_is_blind(bad):
    """One bad gradient entry in a row that no control prompt reads still rejects the step."""
    problem = token_problem(2)
    optimizer = wrap(problem, Budget(mean=1e6))
    problem.backward(0)
    optimizer.step()
    problem.backward(1)
    unread = next(i for i in range(13) if not any(i in p.tolist() + r.tolist() for p, r in _control(problem)))
    problem.model.embed.weight.grad[unread, 0] = bad
    before = picture(problem.model, optimizer)
    optimizer.step()
    assert optimizer.last.action is Action.REJECT
    assert "update is not finite" in optimizer.last.error
    assert picture(problem.model, optimizer) == before


def _control(problem: Problem):
    return zip(problem.kl.control.prompts, problem.kl.control.responses, strict=True)


@given(error=st.sampled_from(FAILURES), after=st.integers(0, 2))
def test_a_failure_inside_a_window_undoes_the_whole_window(error, after):
    """The user's own code may raise between two inner steps."""
    problem = token_problem(5)
    optimizer = wrap(problem, Budget(mean=math.inf))
    problem.backward(0)
    optimizer.step()
    problem.backward(1)
    before = picture(problem.model, optimizer)
    with pytest.raises(type(error)), optimizer.window():
        for step in range(after):
            problem.backward(step + 1)
            optimizer.step()
        raise error
    assert picture(problem.model, optimizer) == before
    problem.backward(1)
    optimizer.step()
    assert optimizer.last.action is Action.COMMIT


def test_a_closure_that_writes_weights_state_and_lr_is_undone_on_a_reject():
    """Whatever a KL closure did to parameters, moments and learning rate, a rejection brings them back."""
    problem = policy_problem(3)

    def vandal():
        with torch.no_grad():
            for p in problem.model.parameters():
                p.add_(5.0)
        problem.optimizer.param_groups[0]["lr"] = 123.0
        problem.optimizer.state[problem.model.scalar]["step"] += 7
        problem.model.norm.running_mean += 1
        return 1.0

    optimizer = wrap(Problem(problem.model, problem.optimizer, lambda: 0.0, problem.batch), 0.5, Gate())
    problem.backward(0)
    optimizer.step()
    problem.backward(1)
    before = picture(problem.model, optimizer)
    before.pop("buffers")  # a module that the closure never calls is not known to the audit
    optimizer.step(kl=vandal)
    assert optimizer.last.action is Action.REJECT
    after = picture(problem.model, optimizer)
    after.pop("buffers")
    assert after == before


def test_a_closure_that_writes_weights_cannot_commit_what_it_wrote():
    """What is committed are the weights that the closure was given."""
    weight = torch.nn.Parameter(torch.zeros(2))

    def vandal():
        with torch.no_grad():
            weight.add_(5.0)
        return 0.1

    optimizer = STEPOptimizer(torch.optim.SGD([weight], lr=1.0), kl=vandal, budget=0.5)
    weight.grad = -torch.ones(2)
    optimizer.step()
    assert weight.tolist() == [1.0, 1.0]


class Broken(Controller):
    """A controller with a bug."""

    def decide(self, trial):
        trial.at(0.5)
        raise ZeroDivisionError("controller bug")


def test_a_controller_that_raises_leaves_theta_t():
    """A bug in a user's controller is not a half-made step."""
    problem = token_problem(5)
    optimizer = wrap(problem, Budget(mean=0.0), Broken())
    problem.backward(0)
    survives_controller = picture(problem.model, optimizer)
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    assert picture(problem.model, optimizer) == survives_controller


def test_a_schedule_that_goes_wrong_is_refused_before_the_inner_step():
    """A budget callable that returns NaN raises with theta_t untouched."""
    problem = token_problem(5)
    optimizer = wrap(problem, Budget(mean=lambda step: math.nan))
    problem.backward(0)
    before = picture(problem.model, optimizer)
    with pytest.raises(ValueError, match=r"budget\.mean"):
        optimizer.step()
    assert picture(problem.model, optimizer) == before


def test_an_error_that_is_raised_is_in_the_log_too():
    """A failed step has a record, with its error and success=False."""
    problem = policy_problem(8)
    optimizer = wrap(problem, Budget(mean=1.0))
    problem.backward(0)
    problem.kl.fn = Bomb(problem.kl.fn, 2, RuntimeError("boom"))
    survives(problem, optimizer, RuntimeError("boom"))


def test_an_audit_that_cannot_be_cleaned_up_does_not_keep_the_step_from_being_undone(monkeypatch):
    """A device that fails for good while module flags are put back costs those flags, not the weights."""
    problem = token_problem(5)
    optimizer = wrap(problem, Budget(mean=math.inf))
    problem.backward(0)
    optimizer.step()
    problem.backward(1)
    before = picture(problem.model, optimizer)

    def broken(*_):
        raise RuntimeError("device lost")

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="device lost"):
        patched.setattr("step_optim.isolation.eval_mode._Modes.restore", broken)
        optimizer.step()
    after = picture(problem.model, optimizer)
    assert (after["parameters"], after["state"]) == (before["parameters"], before["state"])
    assert "device lost" in optimizer.last.error
    assert not undo._open.undos  # it is given up, and all else was undone
    assert torch._dynamo.eval_frame._stance.stance == "default"
    torch.nn.modules.module._global_forward_pre_hooks.clear()
    optimizer.step()
    assert optimizer.last.action is Action.COMMIT
