"""Budgets hold: whatever is committed was audited feasible on exactly those bits, or nothing moved."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from step_optim import (
    Action,
    Budget,
    Controller,
    Gate,
    GateStalled,
    Interpolate,
    Movement,
    Project,
    Steer,
    STEPOptimizer,
    Trial,
    kl_closure,
)
from tests.strategies import Policy, Problem, bits, budgets, controllers, policy_problem, problems, token_problem, wrap


def weights(problem: Problem) -> list[object]:
    return [bits(p) for p in problem.model.parameters()]


@given(problem=problems(), budget=budgets(), controller=controllers())
def test_what_is_committed_was_audited_feasible_on_those_bits(problem, budget, controller):
    """Re-auditing the committed weights against the previous ones gives exactly the recorded figures."""
    optimizer = wrap(problem, budget, controller)
    problem.model.train()
    for step in range(4):
        problem.backward(step)
        before = weights(problem)
        observer = copy.copy(problem.kl)  # it takes its own reference, whatever the optimizer keeps
        observer.anchor()
        optimizer.step()
        record = optimizer.last
        if record.action is Action.REJECT:
            assert weights(problem) == before
            assert record.accepted.mean == 0
            continue
        again = observer()
        assert again == record.accepted
        limits = budget.at(step, problem.kl.slices)
        assert limits.judge(again).feasible


@given(problem=problems(), controller=controllers())
def test_a_zero_budget_lets_no_movement_through(problem, controller):
    """With eps = 0 the policy on the control set stays exactly where it was."""
    optimizer = wrap(problem, Budget(mean=0.0), controller)
    for step in range(2):
        problem.backward(step)
        optimizer.step()
        assert optimizer.last.accepted.mean == 0.0


@pytest.mark.parametrize(
    ("controller", "action"),
    [(Gate(), Action.REJECT), (Interpolate(), Action.SHRINK), (Project(), Action.PROJECT), (Steer(), Action.STEER)],
)
def test_every_outcome_really_happens(controller, action):
    """A loose budget commits; a tight one rejects, shrinks or projects, by controller."""
    problem = token_problem(3)
    optimizer = wrap(problem, Budget(mean=math.inf), controller)
    problem.backward(0)
    optimizer.step()
    assert optimizer.last.action is Action.COMMIT
    optimizer.set_budget(Budget(slices={"a": optimizer.last.accepted.slices["a"] / 20}))
    problem.backward(1)
    optimizer.step()
    assert optimizer.last.action is action
    assert optimizer.last.triggered
    assert optimizer.last.bound == "slice:a"


def test_a_committed_step_costs_one_control_forward():
    """The audit that licensed a commit is the next reference: n commits cost n + 1 evaluations."""
    problem = policy_problem(1)
    calls = []
    evaluate = problem.kl.fn
    problem.kl.fn = lambda: calls.append(1) or evaluate()
    # Gradients come from elsewhere: a training forward would move the BatchNorm statistics that the policy reads.
    problem.model.eval()
    optimizer = wrap(problem, Budget(mean=math.inf))
    for step in range(5):
        optimizer.zero_grad()
        problem.loss(step).backward()
        optimizer.step()
    assert len(calls) == 5 + 1


def test_a_rejected_step_keeps_its_reference():
    """After a rejection the weights are the reference's still, and nothing is evaluated again."""
    problem = policy_problem(1)
    problem.model.eval()
    optimizer = wrap(problem, Budget(mean=0.0), Gate())
    calls = []
    evaluate = problem.kl.fn
    problem.kl.fn = lambda: calls.append(1) or evaluate()
    for step in range(3):
        optimizer.zero_grad()
        problem.loss(step).backward()
        optimizer.step()
    assert optimizer.summary()["rejects"] == 3
    assert len(calls) == 3 + 1


@pytest.mark.parametrize("edit", ["in place", "through .data", "buffer", "load_state_dict"])
def test_a_stale_reference_is_taken_anew(edit):
    """If something else moved the policy since the last commit, movement is measured from there, not from before."""
    problem = policy_problem(2)
    problem.model.eval()
    optimizer = wrap(problem, Budget(mean=math.inf))
    optimizer.zero_grad()
    problem.loss(0).backward()
    optimizer.step()
    with torch.no_grad():
        if edit == "in place":
            problem.model.head.weight += 1.0
        elif edit == "through .data":
            problem.model.head.weight.data.copy_(torch.randn(4, 8) * 3)
        elif edit == "buffer":
            problem.model.norm.running_mean += 2.0
        else:
            problem.model.load_state_dict(Policy().state_dict())
    observer = copy.copy(problem.kl)
    observer.anchor()
    optimizer.zero_grad()
    problem.loss(1).backward()
    optimizer.step()
    assert observer() == optimizer.last.accepted


def test_a_step_that_moves_nothing_is_committed_without_an_audit():
    """Zero gradients and lr 0 materialise the optimizer's state (checkpointing does this) and measure nothing."""
    problem = policy_problem(0, lr=0.0)
    problem.kl.anchor()
    optimizer = wrap(problem, Budget(mean=0.0), Gate())
    for p in problem.model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert optimizer.last.action is Action.UNCHANGED
    assert optimizer.last.audits == 0
    assert len(optimizer.state) > 0


def test_a_window_makes_several_inner_steps_one_candidate():
    """Inside window() nothing is audited; at its end the whole way is one candidate, measured once."""
    problem = token_problem(4)
    optimizer = wrap(problem, Budget(mean=1e-6))
    before = [p.detach().clone() for p in problem.model.parameters()]
    with optimizer.window():
        for step in range(3):
            problem.backward(step)
            optimizer.step()
    assert optimizer.last.step == 0
    assert optimizer.last.action is Action.SHRINK
    assert optimizer.last.accepted.mean <= 1e-6
    assert any(not torch.equal(p, b) for p, b in zip(problem.model.parameters(), before, strict=True))
    with pytest.raises(RuntimeError, match="window"), optimizer.window(), optimizer.window():
        pass


def test_a_rejected_window_keeps_the_schedulers_lr():
    """What a scheduler wrote between the inner steps stays; what the optimizer wrote is rolled back."""
    problem = policy_problem(4, inner="NAdam")
    optimizer = wrap(problem, Budget(mean=0.0), Gate())
    buffers_before = [bits(b) for b in problem.model.buffers()]
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    state_before = bits(dict(problem.optimizer.state))
    with optimizer.window():
        for step in range(3):
            problem.backward(step)
            optimizer.step()
            scheduler.step()
    assert optimizer.last.action is Action.REJECT
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05 * 0.5**3)
    assert bits(dict(problem.optimizer.state)) == state_before
    assert [bits(b) for b in problem.model.buffers()] == buffers_before  # the policy's too


class Half(Controller):
    """Half of the step, or nothing."""

    def decide(self, trial: Trial):
        half = trial.at(0.5)
        return trial.accept(half) if half.feasible else trial.reject()


class Cheat(Controller):
    """Accepts the infeasible candidate."""

    def decide(self, trial: Trial):
        return trial.accept(trial.candidate)


def test_a_controller_of_ones_own():
    """A small class is enough for a new controller; its half step is exactly half way."""
    weight = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = STEPOptimizer(
        torch.optim.SGD([weight], lr=1.0), kl=lambda: weight.abs().max(), budget=0.6, controller=Half()
    )
    weight.grad = torch.tensor([-1.0, 0.0, 0.0], dtype=torch.float64)
    optimizer.step()
    assert weight.tolist() == [0.5, 0.0, 0.0]
    assert optimizer.last.alpha == 0.5


def test_a_controller_cannot_commit_what_is_not_feasible():
    """The transaction, not the controller, has the last word, and theta_t is back."""
    weight = torch.nn.Parameter(torch.zeros(3))
    optimizer = STEPOptimizer(
        torch.optim.SGD([weight], lr=1.0), kl=lambda: weight.abs().max(), budget=0.6, controller=Cheat()
    )
    weight.grad = -torch.ones(3)
    with pytest.raises(RuntimeError, match="not a feasible point"):
        optimizer.step()
    assert weight.tolist() == [0.0, 0.0, 0.0]


def line(budget: float, controller: Controller | None = None, **options) -> tuple[STEPOptimizer, torch.nn.Parameter]:
    """A weight that SGD moves by 1 a step, with KL = its distance from where the step began."""
    weight = torch.nn.Parameter(torch.zeros(1))
    start = torch.zeros(1)
    weight.register_hook(lambda grad: grad)
    optimizer = STEPOptimizer(
        torch.optim.SGD([weight], lr=1.0),
        kl=lambda: (weight - start).abs(),
        budget=budget,
        controller=controller,
        **options,
    )
    optimizer.register_step_pre_hook(lambda *_: (start.copy_(weight.detach()), None)[1])
    weight.grad = torch.tensor([-1.0])
    return optimizer, weight


def test_a_gate_with_patience_falls_back_to_the_budget():
    """After n rejections in a row the gate shrinks the step and says that it stalled."""
    optimizer, weight = line(0.25, Gate(patience=2))
    actions = []
    for _ in range(6):
        optimizer.step()
        actions.append((str(optimizer.last.action), optimizer.last.stalled))
    assert actions == [("reject", False), ("reject", False), ("shrink", True)] * 2
    assert weight.item() == pytest.approx(0.5, rel=0.03)


def test_a_stalled_gate_can_raise():
    """on_stall="raise" ends a livelock loudly, with the weights restored."""
    optimizer, weight = line(0.25, Gate(patience=1, on_stall="raise"))
    optimizer.step()
    with pytest.raises(GateStalled, match="budget"):
        optimizer.step()
    assert weight.item() == 0.0


def test_a_livelock_is_warned_of_once_and_the_remedy_works():
    """Five rejections in a row, nothing has changed; adaptive_rate=True, which the warning names, ends them."""
    optimizer, weight = line(0.25, Gate())
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(20):
            optimizer.step()
    assert weight.item() == 0.0
    (warning,) = told
    assert "5 steps in a row" in str(warning.message)
    assert "adaptive_rate=True" in str(warning.message)
    optimizer, weight = line(0.25, Gate(), adaptive_rate=True)
    for _ in range(20):
        optimizer.step()
    assert weight.item() > 1.0


def test_a_gate_with_patience_is_not_warned_of():
    """Its row ends by itself."""
    optimizer, _ = line(0.25, Gate(patience=12))
    for _ in range(12):
        optimizer.step()
    assert optimizer.last.action == "reject"


def test_keep_state_keeps_the_moments_of_a_rejected_step():
    """on_reject="keep_state" restores the weights alone; "restore" restores the moments too."""
    for option, momentum in (("keep_state", -1.0), ("restore", None)):
        weight = torch.nn.Parameter(torch.zeros(1))
        optimizer = STEPOptimizer(
            torch.optim.SGD([weight], lr=1.0, momentum=0.9),
            kl=lambda weight=weight: weight.abs(),
            budget=0.1,
            controller=Gate(on_reject=option),
        )
        weight.grad = torch.tensor([-1.0])
        optimizer.step()
        assert weight.item() == 0.0
        buffer = optimizer.state[weight].get("momentum_buffer")
        assert (None if buffer is None else float(buffer)) == momentum


def test_budgets_may_be_schedules_and_may_cap_the_drift():
    """A callable budget is asked with the step index; reference= bounds the movement from the start of training."""
    problem = policy_problem(5)
    problem.model.eval()
    budget = Budget(mean=lambda step: [1e-3, 1e-4, 1e-5][min(step, 2)], reference=2e-3)
    optimizer = wrap(problem, budget)
    for step in range(12):
        optimizer.zero_grad()
        problem.loss(0).backward()
        optimizer.step()
        assert optimizer.last.budget.mean == [1e-3, 1e-4, 1e-5][min(step, 2)]
        assert optimizer.last.reference_drift.mean <= 2e-3
    optimizer.set_budget(Budget(reference=2e-3))
    for _ in range(20):
        optimizer.zero_grad()
        problem.loss(0).backward()
        optimizer.step()
        assert optimizer.last.reference_drift.mean <= 2e-3
    assert optimizer.last.bound == "drift"


def test_where_the_kl_closure_can_be_given():
    """In the constructor, by bind(), for one step by keyword, or literally as step(closure) if it is marked."""
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = STEPOptimizer(torch.optim.SGD([weight], lr=1.0), budget=0.5)
    weight.grad = torch.tensor([-1.0])
    with pytest.raises(RuntimeError, match="bind"):
        optimizer.step()
    assert weight.item() == 0.0
    optimizer.step(kl=lambda: weight.abs())
    assert optimizer.last.alpha == pytest.approx(0.5, rel=0.01)

    @kl_closure
    def marked():
        return Movement(0.0, {"a": 0.0})

    optimizer.step(marked)
    assert optimizer.last.action is Action.COMMIT
    assert optimizer.last.accepted.slices == {"a": 0.0}
    losses = []
    optimizer.bind(lambda: 0.0)

    def loss():
        losses.append(1)
        return torch.tensor(7.0)

    assert float(optimizer.step(loss)) == 7.0
    assert losses == [1]


@given(kl=st.floats(0.0, 2.0), budget=st.floats(0.0, 2.0))
def test_plain_functions_decide_by_kl_at_most_budget(kl, budget):
    """A gate commits exactly when K <= eps."""
    optimizer, weight = line(budget, Gate())
    optimizer.step(kl=lambda: kl)
    assert (optimizer.last.action is Action.COMMIT) == (kl <= budget)
    assert weight.item() == (1.0 if kl <= budget else 0.0)


def test_notes_reach_the_record_of_the_next_step():
    """note() is written once, with the step it belongs to."""
    optimizer, _ = line(5.0)
    optimizer.note(reward=1.5, epoch=3)
    optimizer.step()
    assert optimizer.last.reward == 1.5
    assert optimizer.last.notes == {"epoch": 3}
    optimizer.step()
    assert optimizer.last.reward is None


def test_two_parameters_on_one_storage_are_shrunk_once():
    """Tied memory is interpolated once: alpha 0.5 stays 0.5."""
    memory = torch.zeros(2)
    a, b = torch.nn.Parameter(memory), torch.nn.Parameter(memory)
    a.grad = torch.tensor([-1.0, 0.0])
    b.grad = torch.zeros(2)
    optimizer = STEPOptimizer(
        torch.optim.SGD([{"params": [a]}, {"params": [b]}], lr=1.0), kl=lambda: a.abs().max(), budget=0.5
    )
    optimizer.step()
    assert a[0].item() == pytest.approx(0.5, rel=0.01)
    assert optimizer.last.alpha == pytest.approx(a[0].item())
    assert a.data_ptr() == b.data_ptr()


def test_low_precision_logs_the_alpha_that_rounding_left():
    """bf16 weights cannot take every alpha: the realised one is measured on what was committed."""
    weight = torch.nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
    start = weight.detach().clone()
    optimizer = STEPOptimizer(
        torch.optim.SGD([weight], lr=1.0),
        kl=lambda: float((weight.float() - start.float()).square().sum()),
        budget=1e-3,
    )
    weight.grad = torch.full((64,), -0.02, dtype=torch.bfloat16)
    optimizer.step()
    moved = (weight.float() - start.float()).mean().item()
    candidate = float((torch.ones(1, dtype=torch.bfloat16) + torch.tensor(0.02, dtype=torch.bfloat16)).float()) - 1
    assert optimizer.last.alpha_realised == pytest.approx(moved / candidate)
    assert optimizer.last.accepted.mean <= 1e-3


def test_a_budget_can_be_assigned():
    """It is `set_budget`: the next step is judged by it, and a bad one is refused with the old one in force."""
    optimizer, weight = line(5.0, Gate())
    optimizer.budget = 0.5
    assert optimizer.budget == Budget(mean=0.5)
    optimizer.step()
    assert optimizer.last.action is Action.REJECT
    for bad, error in ((-1.0, ValueError), ("0.1", TypeError)):
        with pytest.raises(error, match="budget"):
            optimizer.budget = bad
    assert optimizer.budget == Budget(mean=0.5)
    optimizer.budget = Budget(mean=2.0)
    optimizer.step()
    assert weight.item() == 1.0


@pytest.mark.parametrize("name", ["on_reject", "on_shrink"])
@pytest.mark.parametrize("value", ["keep-state", "Restore", "", None, True, 0])
def test_an_option_of_a_subclass_that_is_misspelt_is_refused(name, value):
    """Anything but "keep_state" would mean "restore" in silence. The message has class, option, value and choices."""
    wrong = type("Mine", (Half,), {name: value})
    words = rf"Mine\.{name}={value!r} is unknown; use 'restore' or 'keep_state'"
    with pytest.raises(ValueError, match=words):
        line(1.0, wrong())
    optimizer, _ = line(1.0)
    with pytest.raises(ValueError, match=words):
        optimizer.controller = wrong()
    assert isinstance(optimizer.controller, Interpolate)


@pytest.mark.parametrize("name", ["on_rejct", "on_rejects", "onreject", "on_shrinks", "on_shrunk"])
def test_the_name_of_an_option_that_is_misspelt_is_refused(name):
    """Nobody would ever read it. Methods and other options of a subclass are its own business."""
    with pytest.raises(ValueError, match=rf"Mine\.{name}='keep_state': there is no such option; if on_(reject|shrink)"):
        line(1.0, type("Mine", (Half,), {name: "keep_state"})())
    line(1.0, type("Mine", (Half,), {name: lambda self: None, "on_start": "keep_state"})())


def steep(budget: float, controller: Controller) -> tuple[STEPOptimizer, torch.nn.Parameter]:
    """As `line`, with a KL that is no parabola, so that a search has something to remember."""
    optimizer, weight = line(budget, controller)
    flat = optimizer._run.kl.fn
    optimizer.bind(lambda: torch.expm1(3 * flat()))
    return optimizer, weight


def history(optimizers: list[STEPOptimizer], steps: int = 6) -> list[list[object]]:
    """What each of some optimizers does, in turns."""
    seen: list[list[object]] = [[] for _ in optimizers]
    for _ in range(steps):
        for optimizer, records in zip(optimizers, seen, strict=True):
            optimizer.step()
            own = copy.deepcopy(optimizer.state_dict()["step_optim"])
            records.append((optimizer.last.alpha, optimizer.last.trials, own))
    return seen


@pytest.mark.parametrize("make", [Interpolate, lambda: Interpolate("bisect")])
def test_one_controller_in_two_optimizers_is_two_controllers(make):
    """What a search remembers belongs to the run: trials, memories and checkpoints are those of two controllers."""
    shared = make()
    together = history([steep(0.5, shared)[0], steep(7.0, shared)[0]])
    apart = history([steep(0.5, make())[0], steep(7.0, make())[0]])
    assert [[step[:2] for step in run] for run in together] == [[step[:2] for step in run] for run in apart]
    kept = [[[step[2]["controller"] for step in run] for run in runs] for runs in (together, apart)]
    assert kept[0] == kept[1]
    if shared.search == "model":
        assert kept[0][0][-1] != kept[0][1][-1]


class Counts(Controller):
    """Counts its decisions, in the run's memory and in an attribute, and may fail afterwards."""

    def __init__(self) -> None:
        self.own, self.fails = 0, False

    def decide(self, trial: Trial):
        trial.memory.setdefault("seen", []).append(trial.candidate.movement.mean)
        self.own += 1
        if self.fails:
            raise ArithmeticError
        return trial.reject()

    def state_dict(self):
        return {"own": self.own}

    def load_state_dict(self, state):
        self.own = state["own"]


def test_a_failed_step_takes_back_what_a_controller_remembered():
    """Memory of the run and state of the controller are those before the step, also if they were changed in place."""
    optimizer, _ = line(0.5, Counts())
    optimizer.step()
    optimizer.controller.fails = True
    with pytest.raises(ArithmeticError):
        optimizer.step()
    assert optimizer._run.memory == {"seen": [1.0]}
    assert optimizer.controller.own == 1


def test_memory_and_state_of_a_controller_survive_a_checkpoint():
    """Both lie under the key "controller", as ever; a copy of the optimizer has a memory of its own."""
    optimizer, _ = line(0.5, Counts())
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    assert saved["step_optim"]["controller"] == {"seen": [1.0], "own": 1}
    again, _ = line(0.5, Counts())
    again.load_state_dict(saved)
    assert (again._run.memory, again.controller.own) == ({"seen": [1.0]}, 1)
    again.step()
    assert saved["step_optim"]["controller"] == {"seen": [1.0], "own": 1}
    assert again.state_dict()["step_optim"]["controller"] == {"seen": [1.0, 1.0], "own": 2}
    other = copy.copy(again)
    other._run.memory["seen"].append(3.0)
    assert again._run.memory["seen"] == [1.0, 1.0]


def test_another_controller_begins_without_a_memory():
    """What the one before it has left there may mean something else."""
    optimizer, _ = steep(0.5, Interpolate())
    history([optimizer])
    assert optimizer._run.memory
    same = optimizer.controller
    optimizer.controller = same
    assert optimizer._run.memory
    optimizer.controller = Interpolate()
    assert not optimizer._run.memory


@pytest.mark.parametrize("budget", [0.5, math.inf])
@pytest.mark.parametrize("what", ["gradient", "KL"])
def test_what_is_not_finite_is_an_error_everywhere_or_nowhere(what, budget):
    """An error is set exactly where the step is no success, and counted; `note(success=True)` cannot hide it."""
    optimizer, weight = line(budget)
    optimizer.note(success=True)
    if what == "gradient":
        weight.grad = torch.tensor([math.nan])
        optimizer.step()
    else:
        optimizer.step(kl=lambda: math.nan)
    record = optimizer.last
    assert (record.action, record.success) == (Action.REJECT, False)
    assert "not finite" in record.error
    assert optimizer.summary()["errors"] == 1
    weight.grad = torch.tensor([-0.1])
    optimizer.step()
    assert (optimizer.last.success, optimizer.last.error, optimizer.summary()["errors"]) == (True, None, 1)
