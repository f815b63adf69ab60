"""Bad input is refused where it is given, with the argument, the value and the remedy, and no weight moves."""

import copy
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from step_optim import (
    Budget,
    Controller,
    ControlSet,
    Gate,
    Interpolate,
    Movement,
    PolicyKL,
    Project,
    STEPOptimizer,
    TokenKL,
    kl_closure,
)
from tests.models import VOCAB, Bigram, ragged_control, tiny_llama


def named(*parts: str) -> str:
    """A pattern that holds these texts in this order."""
    return "(?s)" + ".*".join(re.escape(part) for part in parts)


def label(value: object) -> str:
    """Short test ids: no patterns, no addresses."""
    if isinstance(value, str) and value.startswith("(?s)"):
        return "message"
    return value.__name__ if isinstance(value, type) else re.sub(r" at 0x.*|\s+", " ", repr(value))[:40].strip()


class Unmoved:
    """A model and its optimizer; `check` fails if a weight or the optimizer's state changed."""

    def __init__(self, model: nn.Module | None = None) -> None:
        self.model = tiny_llama() if model is None else model
        self.inner = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        for p in self.model.parameters():
            p.grad = torch.ones_like(p)
        self._before = copy.deepcopy(self.model.state_dict())

    def check(self) -> None:
        """Compare bit by bit."""
        for name, tensor in self.model.state_dict().items():
            assert torch.equal(tensor, self._before[name]), name
        assert len(self.inner.state) == 0


@pytest.fixture
def unmoved():
    """A setup whose weights must not move during the test."""
    setup = Unmoved()
    yield setup
    setup.check()


def test_no_kl_closure_at_the_first_step(unmoved) -> None:
    """A step that would measure nothing is an error that says where a closure goes, not a silent no-op."""
    optimizer = STEPOptimizer(unmoved.inner, budget=0.03)
    with pytest.raises(RuntimeError, match=named("no KL closure", "kl=", "step()", "bind(kl)")):
        optimizer.step()
    with pytest.raises(RuntimeError, match="no KL closure"), optimizer.window():
        pytest.fail("the window must not open")


@pytest.mark.parametrize(
    ("value", "error"),
    [(math.nan, ValueError), (-0.1, ValueError), (-math.inf, ValueError), ("0.1", TypeError), (True, TypeError)],
)
@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("budget.mean", lambda value: Budget(mean=value)),
        ("budget.slices", lambda value: Budget(slices=value)),
        ("budget.slices['early']", lambda value: Budget(slices={"early": value})),
        ("budget.reference", lambda value: Budget(reference=value)),
        ("budget.mean", lambda value: value),
    ],
)
def test_budgets_that_are_no_kl(unmoved, name, make, value, error) -> None:
    """NaN, negative and non-numbers are refused at construction by name and value, with an example of what is meant."""
    with pytest.raises(error, match=named(name, repr(value), "nats per token")):
        STEPOptimizer(unmoved.inner, kl=TokenKL(unmoved.model, ragged_control()), budget=make(value))


def test_a_schedule_that_turns_bad() -> None:
    """A callable budget is checked at the step that it serves; that step changes nothing."""
    setup = Unmoved()
    optimizer = STEPOptimizer(
        setup.inner, kl=TokenKL(setup.model, ragged_control()), budget=Budget(mean=lambda step: -1.0)
    )
    with pytest.raises(ValueError, match=named("budget.mean=-1.0", "KL >= 0 in nats per token")):
        optimizer.step()
    setup.check()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Budget, named("Budget() limits nothing", "pass mean=, slices=, drift= or drift_slices=")),
        (lambda: Budget(slices={}), named("budget.slices={} limits no slice", "name a slice")),
        (lambda: Budget.of(None), named("limits nothing")),
    ],
    ids=label,
)
def test_budgets_that_limit_nothing(make, message) -> None:
    """An empty budget is a mistake; measuring only is asked for with inf."""
    with pytest.raises(ValueError, match=message):
        make()


def test_unknown_slice(unmoved) -> None:
    """A budget for a slice that the control set does not have lists those that it has."""
    kl = TokenKL(unmoved.model, ragged_control())
    budget = Budget(slices={"saftey": 0.1})
    with pytest.raises(ValueError, match=named("unknown slice 'saftey'", "known slices: ['early', 'late']")):
        STEPOptimizer(unmoved.inner, kl=kl, budget=budget)
    optimizer = STEPOptimizer(unmoved.inner, kl=kl, budget=1.0)
    with pytest.raises(ValueError, match="unknown slice 'saftey'"):
        optimizer.set_budget(budget)
    assert optimizer.budget == Budget(mean=1.0)
    late = STEPOptimizer(unmoved.inner, budget=budget)
    with pytest.raises(ValueError, match="unknown slice 'saftey'"):
        late.bind(kl)
    with pytest.raises(ValueError, match="unknown slice 'saftey'"):
        late.step(kl=kl)


def test_unknown_slice_of_a_plain_function(unmoved) -> None:
    """A function tells its slices when it measures: the step is refused then, and undone."""
    optimizer = STEPOptimizer(unmoved.inner, kl=lambda: {"math": 0.0}, budget=Budget(slices={"code": 0.1}))
    with pytest.raises(ValueError, match=named("unknown slice 'code'", "'math'")):
        optimizer.step()


def test_a_slice_budget_without_slices(unmoved) -> None:
    """One number for every slice of a control set that has none would never bind."""
    kl = TokenKL(unmoved.model, ControlSet.from_ids([[1]], [[2]]))
    with pytest.raises(ValueError, match=named("budget.slices=0.1", "has no slices", "slices={...}")):
        STEPOptimizer(unmoved.inner, kl=kl, budget=Budget(slices=0.1))


@pytest.mark.parametrize(
    ("slices", "error", "message"),
    [
        ({"a": []}, ValueError, named("slice 'a' is empty", "give it a prompt or leave it out")),
        ({"a": [2]}, ValueError, named("slice 'a' holds 2", "prompts are numbered 0 to 1")),
        ({"a": [-1]}, ValueError, named("slice 'a' holds -1", "0 to 1")),
        ({"a": [0, 0]}, ValueError, named("slice 'a' names a prompt twice", "[0, 0]")),
        ({"mean": [0]}, ValueError, named("'mean'", "choose another name")),
        ({3: [0]}, TypeError, named("slice names are texts", "3")),
    ],
    ids=label,
)
def test_bad_slices(slices, error, message) -> None:
    """Slices are checked by name, at construction."""
    with pytest.raises(error, match=message):
        ControlSet.from_ids([[1], [2]], [[3], [4]], slices)


@pytest.mark.parametrize(
    ("prompts", "responses", "message"),
    [
        ([], [], named("the control set is empty", "at least one prompt")),
        ([[1], [2]], [[3]], named("2 prompts but 1 responses", "one response a prompt")),
        ([[1], [2]], [[3], []], named("the response of prompt 1 has no tokens", "every response needs one")),
        ([[1], []], [[3], [4]], named("prompt 1 has no tokens", "every prompt needs one")),
        ([[1], [[2]]], [[3], [4]], named("prompt 1 must be a flat list of token ids", "(1, 1)")),
        ([[1.5]], [[3]], named("prompt 0 must be a flat list of token ids", "float")),
        ([[1]], [[True]], named("the response of prompt 0 must be a flat list", "bool")),
        ([[1]], [[3, -2]], named("the response of prompt 0 has the negative token id -2", "ids start at 0")),
    ],
    ids=label,
)
def test_bad_control_sets(prompts, responses, message) -> None:
    """Empty sets, empty responses and what is no token id are refused by the prompt's number."""
    with pytest.raises(ValueError, match=message):
        ControlSet.from_ids(prompts, responses)


def test_select_nothing() -> None:
    """An empty selection is an empty control set."""
    with pytest.raises(ValueError, match="no prompt is left in the control set"):
        ragged_control().select([])


def test_ids_outside_the_vocabulary(unmoved) -> None:
    """Ids that the model does not have are refused before any forward, with the prompt and a guess at the reason."""
    control = ControlSet.from_ids([[1], [2]], [[3], [4, VOCAB]])
    message = named(f"prompt 1 of the control set has token id {VOCAB}", f"vocabulary of {VOCAB}", "another tokenizer")
    with pytest.raises(ValueError, match=message):
        TokenKL(unmoved.model, control)
    with pytest.raises(ValueError, match=message):
        ControlSet.from_ids(control.prompts, control.responses, vocab_size=VOCAB)


def test_ids_outside_the_vocabulary_of_any_model() -> None:
    """Where a model does not tell its vocabulary, its own failure is explained in the same words."""
    with pytest.raises(ValueError, match=named("prompt 1", "token id", "vocabulary")):
        TokenKL(Bigram(), ControlSet.from_ids([[1], [2]], [[3], [4, VOCAB]]))


def test_parameters_that_the_model_does_not_have(unmoved) -> None:
    """An optimizer over something else, whose movement the audit cannot see, is refused at construction and at bind."""
    other = nn.Linear(3, 2)
    inner = torch.optim.SGD([*unmoved.model.parameters(), *other.parameters()], lr=0.1)
    kl = TokenKL(unmoved.model, ragged_control())
    message = named("2 of the optimizer's", "not parameters of the model", "(2, 3)", "check_parameters=False")
    with pytest.raises(ValueError, match=message):
        STEPOptimizer(inner, kl=kl, budget=1.0)
    optimizer = STEPOptimizer(inner, budget=1.0)
    with pytest.raises(ValueError, match=message):
        optimizer.bind(kl)
    with pytest.raises(ValueError, match=message):
        optimizer.step(kl=kl)
    tolerant = TokenKL(unmoved.model, ragged_control(), check_parameters=False)
    assert STEPOptimizer(inner, kl=tolerant, budget=1.0).optimizer is inner


def test_a_group_of_strangers_added_later(unmoved) -> None:
    """Parameters that join by add_param_group are checked too, and a refused group is not kept."""
    optimizer = STEPOptimizer(unmoved.inner, kl=TokenKL(unmoved.model, ragged_control()), budget=1.0)
    with pytest.raises(ValueError, match="not parameters of the model"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    assert len(optimizer.param_groups) == 1


def normal_policy(actor: nn.Module) -> PolicyKL:
    """A policy without logits."""
    return PolicyKL(lambda: torch.distributions.Normal(actor(torch.eye(3)), 1.0))


@pytest.mark.parametrize("make", [lambda actor: lambda: 0.0, lambda actor: kl_closure(lambda: 0.0), normal_policy])
def test_project_without_logits(make: Callable[[nn.Module], Any]) -> None:
    """Project over a closure that has no logits names both, and the alternatives, at construction, bind and step."""
    setup = Unmoved(nn.Linear(3, 2))
    kl = make(setup.model)
    message = named("controller=Project(", "kl=", "TokenKL", "Interpolate()")
    with pytest.raises(ValueError, match=message):
        STEPOptimizer(setup.inner, kl=kl, budget=1.0, controller=Project())
    optimizer = STEPOptimizer(setup.inner, budget=1.0, controller=Project())
    with pytest.raises(ValueError, match=message):
        optimizer.bind(kl)
    with pytest.raises(ValueError, match=message):
        optimizer.step(kl=kl)
    setup.check()


def test_differentiable_optimizers(unmoved) -> None:
    """A rollback would break the graph through the step."""
    inner = torch.optim.SGD(unmoved.model.parameters(), lr=0.1, differentiable=True)
    with pytest.raises(ValueError, match=named("differentiable=True", "use differentiable=False")):
        STEPOptimizer(inner, kl=lambda: 0.0, budget=1.0)


def test_model_on_another_device_than_the_control_set(unmoved) -> None:
    """Both devices are named, and what moves the control set."""
    message = named("the control set is on meta, the model on cpu", "control.to('cpu')")
    with pytest.raises(ValueError, match=message):
        TokenKL(unmoved.model, ragged_control().to("meta"))
    with pytest.raises(ValueError, match=named("the control set is on cpu, the model on meta", "control.to('meta')")):
        TokenKL(copy.deepcopy(unmoved.model).to("meta"), ragged_control())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"optimizer": "adam"}, TypeError, named("optimizer='adam'", "no torch optimizer", "torch.optim.AdamW(...)")),
        ({"controller": "gate"}, TypeError, named("controller='gate' is no Controller", "Gate()")),
        ({"controller": Gate}, TypeError, named("controller=", "is no Controller", "Gate()")),
        ({"on_error": "ignore"}, ValueError, named("on_error='ignore'", "'raise' or 'reject'")),
        ({"kl": 0.1}, TypeError, named("kl=0.1 is not callable", "TokenKL")),
        ({"log": 3}, TypeError, named("log=3", "path", "callable")),
        ({"kl": lambda: 0.0, "budget": Budget(reference=0.1)}, ValueError, named("budget.drift", "TokenKL")),
    ],
    ids=label,
)
def test_arguments_of_the_wrapper(unmoved, options, error, message) -> None:
    """Every argument of STEPOptimizer is checked when it is given."""
    arguments = {"optimizer": unmoved.inner, "kl": lambda: 0.0, "budget": 1.0} | options
    with pytest.raises(error, match=message):
        STEPOptimizer(arguments.pop("optimizer"), **arguments)


def test_wrapping_twice(unmoved) -> None:
    """A trust region around a trust region is refused, with the way to the inner optimizer."""
    optimizer = STEPOptimizer(unmoved.inner, kl=lambda: 0.0, budget=1.0)
    with pytest.raises(TypeError, match=named("STEPOptimizer already", "optimizer.optimizer")):
        STEPOptimizer(optimizer, kl=lambda: 0.0, budget=1.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Gate(patience=0), named("patience=0 must be at least 1")),
        (lambda: Gate(on_stall="cry"), named("on_stall='cry'", "'shrink' or 'raise'")),
        (lambda: Gate(on_reject="x"), named("on_reject='x'", "'restore' or 'keep_state'")),
        (lambda: Interpolate(on_shrink="x"), named("on_shrink='x'", "'restore' or 'keep_state'")),
        (lambda: Project(on_shrink="x"), named("on_shrink='x'", "'restore' or 'keep_state'")),
        (lambda: Interpolate(search="newton"), named("search='newton'", "model", "bisect", "backtrack")),
        (lambda: Interpolate(tol=0), named("tol=0", "between 0 and 1")),
        (lambda: Interpolate(tol=math.nan), named("tol=nan", "between 0 and 1")),
        (lambda: Interpolate(max_trials=0), named("max_trials=0", "at least 1")),
        (lambda: Project(steps=0), named("steps=0", "at least 1")),
        (lambda: TokenKL(Bigram(), ragged_control(), micro_batch=0), named("micro_batch=0", "at least 1")),
    ],
    ids=label,
)
def test_arguments_of_controllers_and_closures(make, message) -> None:
    """Options out of range are refused with what they may be."""
    with pytest.raises(ValueError, match=message):
        make()


def test_token_kl_needs_a_control_set() -> None:
    """A list of texts in its place is refused with the way to build one."""
    with pytest.raises(TypeError, match=named("control=['hello']", "no ControlSet", "from_texts")):
        TokenKL(Bigram(), ["hello"])


class Quiet:
    """Prints as nothing helpful."""


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (None, TypeError, named("KL closure returned NoneType", "return a number")),
        ("0.1", TypeError, named("KL closure returned str '0.1'")),
        (True, TypeError, named("KL closure returned bool")),
        (Quiet(), TypeError, named("KL closure returned Quiet")),
        ([0.1], TypeError, named("KL closure returned list")),
        (torch.zeros(3), ValueError, named("shape (3,)", "mean", "reduce it to one number")),
        (torch.zeros(0), ValueError, named("shape (0,)")),
        (torch.tensor(1j), TypeError, named("KL closure returned", "mean")),
        (-0.25, ValueError, named("-0.25", "never negative", "max(kl, 0)")),
        (torch.tensor(-1e-9), ValueError, named("never negative")),
        ({}, ValueError, named("empty mapping", "{'mean': kl}")),
        ({"math": "x"}, TypeError, named("KL closure returned str 'x' for slice 'math'")),
        ({"math": -1.0}, ValueError, named("-1.0 for slice 'math'")),
        ({"math": torch.zeros(2)}, ValueError, named("shape (2,) for slice 'math'")),
        (Movement(-1.0), ValueError, named("-1.0 for mean")),
        (Movement(1.0, {"a": "b"}), TypeError, named("for slice 'a'")),
    ],
    ids=label,
)
def test_what_a_closure_must_not_return(unmoved, value, error, message) -> None:
    """Wrongly typed, wrongly shaped and negative KL never commit; the error says which figure, and what to return."""
    with pytest.raises(error, match=message):
        Movement.of(value)
    optimizer = STEPOptimizer(unmoved.inner, kl=lambda: value, budget=math.inf)
    with pytest.raises(error, match=message):
        optimizer.step()
    assert optimizer.last.action == "reject"
    assert type(error("")).__name__ in optimizer.last.error


@pytest.mark.parametrize("controller", [Gate(), Interpolate(max_trials=3)])
@pytest.mark.parametrize("value", [math.nan, math.inf, {"mean": 0.0, "a": math.nan}, torch.tensor(math.nan)])
def test_figures_that_are_not_finite_never_commit(unmoved, controller, value) -> None:
    """NaN and inf are measurements that no budget allows, an infinite one included; the record names them."""
    optimizer = STEPOptimizer(unmoved.inner, kl=lambda: value, budget=math.inf, controller=controller)
    optimizer.step()
    assert optimizer.last.action == "reject"
    assert "not finite" in optimizer.last.error


def test_a_controller_that_accepts_what_it_did_not_measure(unmoved) -> None:
    """A custom controller that commits the infeasible candidate is refused and undone."""

    class Careless(Controller):
        def decide(self, trial):
            return trial.accept(trial.candidate)

    optimizer = STEPOptimizer(unmoved.inner, kl=lambda: 1.0, budget=0.5, controller=Careless())
    with pytest.raises(RuntimeError, match="not a feasible point that this trial measured"):
        optimizer.step()


@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan])
def test_a_controller_that_leaves_the_line(unmoved, alpha) -> None:
    """An alpha outside of [0, 1] is refused by its value."""

    class Wild(Controller):
        def decide(self, trial):
            return trial.accept(trial.at(alpha))

    optimizer = STEPOptimizer(unmoved.inner, kl=lambda: 1.0, budget=0.5, controller=Wild())
    with pytest.raises(ValueError, match=named(f"alpha={alpha}", "between 0", "1")):
        optimizer.step()


def test_a_budget_on_drift_that_a_step_closure_cannot_measure(unmoved) -> None:
    """A function for one step does not fit a drift budget that the bound closure did."""
    optimizer = STEPOptimizer(
        unmoved.inner, kl=TokenKL(unmoved.model, ragged_control()), budget=Budget(mean=1.0, reference=1.0)
    )
    with pytest.raises(ValueError, match=named("budget.drift", "measures drift")):
        optimizer.step(kl=lambda: 0.0)


def test_another_controller_is_checked_like_the_first() -> None:
    """Assigned later, a controller meets the same checks; what is refused leaves the old one in place."""
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = STEPOptimizer(torch.optim.SGD([parameter], lr=1.0), kl=lambda: 0.0, budget=1.0, controller=Gate())
    first = optimizer.controller
    with pytest.raises(TypeError, match=named("controller='gate'", "Gate()")):
        optimizer.controller = "gate"
    with pytest.raises(ValueError, match=named("controller=Project", "logits")):
        optimizer.controller = Project()
    with optimizer.window(), pytest.raises(RuntimeError, match="inside a window"):
        optimizer.controller = Interpolate()
    assert optimizer.controller is first
    optimizer.controller = Interpolate()
    assert isinstance(optimizer.controller, Interpolate)
