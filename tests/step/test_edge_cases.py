"""What is easily got wrong in a step: each of these was wrong once."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from step_optim import (
    Action,
    Budget,
    ControlSet,
    Gate,
    GateStalled,
    Interpolate,
    KLClosure,
    Movement,
    PolicyKL,
    Project,
    STEPOptimizer,
    TokenKL,
)
from step_optim.audit import Audit
from step_optim.step.step import Step
from tests.strategies import Bigram, Policy, Problem, bits, picture, policy_problem, token_problem, wrap


def test_the_autocast_cache_does_not_hide_movement():
    """A policy that autocasts by itself, inside a user's autocast region, is read at the new weights."""
    torch.manual_seed(0)
    net, x = nn.Linear(4, 3), torch.randn(8, 4)

    def fn():
        with torch.autocast("cpu", torch.bfloat16):
            return net(x).float()

    kl = PolicyKL(fn)
    optimizer = STEPOptimizer(torch.optim.SGD(net.parameters(), lr=50.0), kl=kl, budget=1e-3, controller=Gate())
    with torch.autocast("cpu", torch.bfloat16):
        net(x).float()[:, 0].sum().backward()
        optimizer.step()
    assert optimizer.last.candidate.mean > 0.1
    assert optimizer.last.action is Action.REJECT


def test_a_head_that_is_unfrozen_later_is_still_seen_to_move():
    """Gradual unfreezing: the reference keeps the old head once training moves it."""
    problem = token_problem(1)
    for p in problem.model.lm_head.parameters():
        p.requires_grad_(False)
    optimizer = wrap(problem, Budget(mean=math.inf))
    problem.backward(0)
    optimizer.step()
    for p in problem.model.lm_head.parameters():
        p.requires_grad_(True)
    for group in optimizer.param_groups:
        group["lr"] = 1.0
    observer = TokenKL(problem.model, problem.kl.control)
    observer.anchor()
    first = optimizer.last.reference_drift.mean
    problem.backward(1)
    optimizer.step()
    assert optimizer.last.accepted == observer()
    assert optimizer.last.accepted.mean > 1e-3
    assert optimizer.last.reference_drift.mean > first


def test_an_interrupt_between_begin_and_the_body_leaves_no_window_open(monkeypatch):
    """Ctrl-C as the transaction begins must not make every later step an unaudited part of it."""
    problem = token_problem(1)
    optimizer = wrap(problem, Budget(mean=0.0), Gate())
    problem.backward(0)
    plain = Step.propose

    def interrupted(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr(Step, "propose", interrupted)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    monkeypatch.setattr(Step, "propose", plain)
    optimizer.step()
    assert optimizer.last.action is Action.REJECT


def test_writes_that_count_up_no_version_are_noticed():
    """Another optimizer's kernel that writes through .data to weights outside of ours makes the reference stale."""
    problem = token_problem(2)
    own = [problem.model.embed.weight]
    optimizer = STEPOptimizer(torch.optim.SGD(own, lr=1e-6), kl=problem.kl, budget=math.inf)
    for step in range(3):
        problem.backward(step)
        problem.model.lm_head.weight.data.add_(0.3)
        optimizer.step()
        assert optimizer.last.candidate.mean < 1e-6


def test_a_failed_anchor_is_tried_again():
    """If taking the reference anew fails after an edit, the edit is not mistaken for the next step's movement."""
    problem = policy_problem(3, lr=1e-6)
    problem.model.eval()
    optimizer = wrap(problem, Budget(mean=math.inf))
    problem.loss(0).backward()
    optimizer.step()
    fn = problem.kl.fn
    with torch.no_grad():
        problem.model.head.weight.data.mul_(3.0)
    problem.kl.fn = lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("simulated"))
    with pytest.raises(torch.OutOfMemoryError):
        optimizer.step()
    problem.kl.fn = fn
    optimizer.step()
    assert optimizer.last.candidate.mean < 1e-5


def test_keep_state_never_keeps_moments_of_a_gradient_that_is_not_finite():
    """A NaN gradient rejects one step, not all later ones; and buffers go back under keep_state too."""
    problem = policy_problem(3)
    optimizer = wrap(problem, Budget(mean=1e6), Gate(on_reject="keep_state"))
    problem.backward(0)
    optimizer.step()
    problem.backward(1)
    problem.model.head.weight.grad[0, 0] = math.nan
    optimizer.step()
    assert optimizer.last.action is Action.REJECT
    problem.backward(2)
    optimizer.step()
    assert optimizer.last.action is Action.COMMIT
    optimizer.set_budget(Budget(mean=0.0))
    buffers = [bits(b) for b in problem.model.buffers()]
    with optimizer.window():
        problem.backward(3)
        optimizer.step()
    assert optimizer.last.action is Action.REJECT
    assert [bits(b) for b in problem.model.buffers()] == buffers


@pytest.mark.parametrize("masked", [True, False])
def test_project_never_does_worse_than_interpolation_where_logits_are_extreme(masked):
    """Action masks (-inf logits) and candidates whose logits overflow do not make Project reject."""
    torch.manual_seed(0)
    net, x = nn.Linear(4, 5), torch.randn(8, 4)
    mask = torch.tensor([0.0, 0.0, 0.0, 0.0, -math.inf if masked else 0.0])
    kl = PolicyKL(lambda: net(x) + mask, slices={"a": [0, 1], "b": [2, 3, 4]})
    lr = 3.0 if masked else 1e38
    optimizer = STEPOptimizer(
        torch.optim.SGD(net.parameters(), lr=lr), kl=kl, budget=Budget(slices=1e-2), controller=Project(steps=2)
    )
    (net(x)[:, 0]).sum().backward()
    optimizer.step()
    if masked:
        assert optimizer.last.action in (Action.SHRINK, Action.PROJECT)
        assert optimizer.last.projection["residual"] <= optimizer.last.projection["residual_interpolation"]
    assert optimizer.last.accepted.worst[1] <= 1e-2


def test_project_trains_a_trained_head():
    """In full fine-tuning the distillation's gradient reaches the output head."""
    problem = token_problem(4)
    kl = problem.kl
    kl.anchor()
    reference = Audit(Movement(0.0), kl._reference)
    with torch.no_grad():
        for p in problem.model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    parameters = list(problem.model.parameters())
    _, loss, gradients = kl.distill(reference, torch.ones(3), parameters)
    by_hand = torch.autograd.grad(_distance(problem.model, kl), parameters)
    assert loss > 0
    for found, expected in zip(gradients, by_hand, strict=True):
        assert torch.allclose(found, expected, rtol=1e-3, atol=1e-6)


def _distance(model: Bigram, kl: TokenKL) -> torch.Tensor:
    """Mean over prompts of the mean over rows of the squared distance to the reference logits."""
    total, row = torch.zeros(()), 0
    for prompt, response in zip(kl.control.prompts, kl.control.responses, strict=True):
        logits = model(torch.cat([prompt, response])[None])[0, len(prompt) - 1 : -1]
        target = kl._reference[slice(row, row + len(response))].logits()
        total = total + (logits - target).square().sum(-1).mean()
        row += len(response)
    return total / len(kl.control)


def test_the_frozen_head_is_one_object_and_not_read_twice():
    """The difference of two policies over one frozen head needs no third matrix product."""
    problem = token_problem(4, freeze_head=True)
    problem.kl.anchor()
    assert problem.kl.audit().policy.head is problem.kl._reference.head


def test_an_error_while_modules_are_quieted_puts_their_modes_back():
    """Out of memory while buffers are saved leaves no module in eval mode, and no hook behind."""

    class Brittle(nn.BatchNorm1d):
        pass

    problem = policy_problem(1)
    problem.model.norm.register_buffer("huge", torch.zeros(2))
    kl = PolicyKL(problem.kl.fn, model=problem.model)
    kl.anchor()
    problem.model.train()
    problem.model.norm._buffers["huge"] = _Unclonable()
    with pytest.raises(torch.OutOfMemoryError):
        kl()
    assert all(module.training for module in problem.model.modules())
    assert not torch.nn.modules.module._global_forward_pre_hooks


class _Unclonable:
    def detach(self):
        raise torch.OutOfMemoryError("simulated")


def test_an_interrupt_during_a_rejection_is_raised_when_the_rollback_is_complete(monkeypatch):
    """Ctrl-C while a rejected step is rolled back is neither lost nor does it leave half a rollback."""
    problem = token_problem(1)
    optimizer = wrap(problem, Budget(mean=0.0), Gate())
    problem.backward(0)
    before = picture(problem.model, optimizer)
    plain, calls = optimizer._snapshot._state.restore, []

    def once(**options):
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        plain(**options)

    monkeypatch.setattr(optimizer._snapshot._state, "restore", once)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    assert picture(problem.model, optimizer) == before


def test_a_note_may_be_a_list():
    """Ids of a batch, as a list, a tensor or an array; trackers get one text."""
    for ids in ([3, 5], (3, 5), torch.tensor([3, 5]), np.array([3, 5]), [torch.tensor(3), np.int64(5)]):
        problem = token_problem(1)
        optimizer = wrap(problem, Budget(mean=math.inf))
        optimizer.note(batch=ids, names=["a", "b"], loss=torch.tensor([0.5]))
        problem.backward(0)
        optimizer.step()
        assert optimizer.last.notes == {"batch": [3, 5], "names": ["a", "b"], "loss": 0.5}
        assert optimizer.last.flat()["step_optim/notes/batch"] == "3 5"


def test_notes_are_plain_before_anything_moves():
    """Tensors of one element become numbers; what no log could hold is refused by note() itself."""
    problem = token_problem(1)
    optimizer = wrap(problem, Budget(mean=math.inf))
    optimizer.note(reward=torch.tensor(1.5, requires_grad=True), grad_norm=torch.tensor(2.0))
    for grads in ([torch.ones(2)], [[1, 2]], torch.ones(2, 2), {"a": 1}, [None]):
        with pytest.raises(TypeError, match=r"note.grads=.* is no number, text or flag, and no list of these"):
            optimizer.note(grads=grads)
    with pytest.raises(TypeError, match=r"note.reward=.* is no single number"):
        optimizer.note(reward=[1.0, 2.0])
    problem.backward(0)
    optimizer.step()
    assert optimizer.last.reward == 1.5
    assert optimizer.last.notes == {"grad_norm": 2.0}


def test_an_error_of_the_log_does_not_hide_the_error_that_is_raised():
    """A full disk in the failure path leaves the real problem visible."""
    problem = token_problem(1)

    def full(*_):
        raise OSError("disk full")

    def broken():
        raise ZeroDivisionError("the real problem")

    optimizer = wrap(Problem(problem.model, problem.optimizer, broken, problem.batch), 1.0, log=full)
    problem.backward(0)
    with pytest.raises(ZeroDivisionError, match="real problem"):
        optimizer.step()


def test_at_the_reference_cap_a_step_is_rejected_soon():
    """A drift at its cap ends in a rejection within a few audits, not in shrinks to nothing."""
    problem = policy_problem(5)
    problem.model.eval()
    optimizer = wrap(problem, Budget(mean=math.inf))
    for step in range(3):
        optimizer.zero_grad()
        problem.loss(step).backward()
        optimizer.step()
    optimizer.set_budget(Budget(reference=optimizer.last.reference_drift.mean * 0.5))
    optimizer.zero_grad()
    problem.loss(3).backward()
    optimizer.step()
    assert optimizer.last.action is Action.REJECT
    assert optimizer.last.audits <= 10


def test_gate_stalled_is_raised_whatever_on_error_says():
    """on_error="reject" is for audits that fail; a gate that was told to raise does."""
    problem = token_problem(1)
    gate = Gate(patience=1, on_stall="raise")
    optimizer = wrap(problem, Budget(mean=0.0), gate, on_error="reject")
    problem.backward(0)
    optimizer.step()
    with pytest.raises(GateStalled):
        optimizer.step()


def test_only_controlled_rejections_use_up_patience():
    """A step that moves nothing, or whose audit fails, says nothing about the budget."""
    weight = nn.Parameter(torch.zeros(1))
    readings = [0.0, 1.0, ValueError("audit"), 1.0, 1.0]  # the first is of the weights before the first step

    def kl():
        value = readings.pop(0)
        if isinstance(value, Exception):
            raise value
        return value

    optimizer = STEPOptimizer(
        torch.optim.SGD([weight], lr=1.0), kl=kl, budget=0.5, controller=Gate(patience=2), on_error="reject"
    )
    weight.grad = torch.ones(1)
    optimizer.step()
    optimizer.step()
    weight.grad = torch.zeros(1)
    optimizer.step()  # unchanged
    weight.grad = torch.ones(1)
    optimizer.step()
    assert not optimizer.last.stalled
    readings[:] = [1.0, 0.5]
    optimizer.step()
    assert optimizer.last.stalled


def test_an_optimizer_without_a_learning_rate_works():
    """Adafactor of transformers sets lr=None and finds its own."""
    weight = nn.Parameter(torch.zeros(2))
    inner = torch.optim.SGD([weight], lr=1.0)
    inner.param_groups[0]["lr"] = None
    inner.step = lambda *_: weight.data.add_(1.0)
    optimizer = STEPOptimizer(inner, kl=lambda: 0.0, budget=1.0)
    optimizer.step()
    assert optimizer.last.lr == ()


def test_gradients_are_not_kept_alive_after_the_step():
    """zero_grad(set_to_none=True) frees the gradients: the snapshot holds no reference to them."""
    import weakref

    problem = token_problem(1)
    optimizer = wrap(problem, Budget(mean=math.inf))
    problem.backward(0)
    grads = [weakref.ref(p.grad) for p in problem.model.parameters()]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    assert not any(ref() is not None for ref in grads)


def test_a_closure_class_of_ones_own_is_isolated_too():
    """A KLClosure subclass that does not isolate itself still disturbs nothing."""
    model = Policy()
    x = torch.randn(6, 5)

    class Own(KLClosure):
        def audit(self):
            assert not torch.is_grad_enabled()
            model(x)
            torch.rand(2)
            return Audit(Movement(0.1))

    optimizer = STEPOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), kl=Own(), budget=1.0)
    model.train()
    model(x).sum().backward()
    before = picture(model, optimizer)
    optimizer.step()
    after = picture(model, optimizer)
    assert optimizer.last.accepted.mean == 0.1
    for part in ("modes", "buffers", "rng"):
        assert after[part] == before[part]


def test_hooks_see_and_may_replace_the_arguments_of_a_step():
    """Pre-hooks get torch's arguments, and what they return is used."""
    weight = nn.Parameter(torch.zeros(1))
    optimizer = STEPOptimizer(torch.optim.SGD([weight], lr=1.0), kl=lambda: 0.0, budget=1.0)
    seen = []

    def replace(opt, args, kwargs):
        seen.append(args)
        return (opt, lambda: torch.tensor(5.0)), kwargs

    optimizer.register_step_pre_hook(replace)
    assert float(optimizer.step()) == 5.0
    assert seen == [(optimizer,)]


def test_another_control_set_of_the_same_size_is_refused_before_anything_is_loaded():
    """pi_ref is recognised by its token ids; a refused checkpoint leaves the optimizer as it was."""
    problem = token_problem(3)
    optimizer = wrap(problem, Budget(mean=math.inf))
    problem.backward(0)
    optimizer.step()
    control = problem.kl.control
    other = ControlSet.from_ids(control.prompts, [(response + 1) % 13 for response in control.responses])
    fresh = STEPOptimizer(torch.optim.AdamW(problem.model.parameters()), kl=TokenKL(problem.model, other), budget=1.0)
    with pytest.raises(ValueError, match="another control set"):
        fresh.load_state_dict(optimizer.state_dict())
    assert not fresh.state


def test_an_infinity_that_was_there_before_is_no_movement():
    """A mask kept as a parameter with -inf entries does not make every update "not finite"."""
    weight = nn.Parameter(torch.tensor([0.0, -math.inf]))
    optimizer = STEPOptimizer(torch.optim.SGD([weight], lr=1.0), kl=lambda: 0.0, budget=1.0)
    weight.grad = torch.tensor([1.0, 0.0])
    optimizer.step()
    assert optimizer.last.action is Action.COMMIT
    assert optimizer.last.update_norm == 1.0


def test_drift_restarts_on_request_after_new_observations():
    """refresh() keeps pi_ref; refresh(restart_drift=True) takes it anew on the new observations."""
    torch.manual_seed(0)
    net = nn.Linear(4, 2)
    observations = [torch.randn(8, 4)]
    optimizer = STEPOptimizer(
        torch.optim.SGD(net.parameters(), lr=1e-6), kl=PolicyKL(lambda: net(observations[0])), budget=math.inf
    )
    for _ in range(2):
        optimizer.zero_grad()
        net(observations[0]).sum().backward()
        optimizer.step()
        assert optimizer.last.reference_drift.mean < 1e-6
        observations[0] = torch.randn(8, 4)
        optimizer.refresh(restart_drift=True)


def test_the_model_search_judges_each_constraint_by_its_own_slope():
    """A steep constraint does not vouch for a flat one that binds."""
    weight = nn.Parameter(torch.zeros(1))

    def kl():
        alpha = weight.item()
        return {"flat": 0.5 + 0.6 * alpha, "steep": 0.9 * alpha**4}

    optimizer = STEPOptimizer(
        torch.optim.SGD([weight], lr=1.0), kl=kl, budget=Budget(slices=0.9), controller=Interpolate()
    )
    weight.grad = torch.tensor([-1.0])
    optimizer.step()
    assert optimizer.last.alpha == pytest.approx(0.4 / 0.6, rel=0.01)
    assert optimizer.last.alpha <= 0.4 / 0.6
