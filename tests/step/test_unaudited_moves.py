"""Weights that move past the wrapper are noticed, and so are steps that move none."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from step_optim import Action, Budget, Gate, Interpolate, PolicyKL, STEPOptimizer, read_log, summarise
from step_optim.host.wrapper import Watched
from step_optim.snapshot.tensors import digest
from tests import reference
from tests.models import nudge
from tests.strategies import bits

OUTSIDE = "moved the weights outside of step()"
SOME = torch.randn(32, 3, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(4, (32,), generator=torch.Generator().manual_seed(1))


class SAM(torch.optim.SGD):
    """Climbs along the gradient, comes back, and steps with the gradient from there: in two calls, or by a closure."""

    quiet = 0

    def __init__(self, parameters, lr=0.5):
        super().__init__(parameters, lr=lr)
        self.inside = torch.optim.SGD(self.param_groups, lr=lr)
        self.param_groups = self.inside.param_groups

    def _trained(self):
        return [p for group in self.param_groups for p in group["params"] if p.grad is not None]

    @torch.no_grad()
    def first_step(self, rho: float = 0.05) -> str:
        """Climb."""
        for p in self._trained():
            self.state[p]["here"] = p.clone()
            p.add_(p.grad, alpha=rho)
        return "climbed"

    @torch.no_grad()
    def second_step(self) -> None:
        """Come back, and step."""
        for group in self.param_groups:
            group["calls"] = group.get("calls", 0) + 1
        for p in self._trained():
            p.copy_(self.state[p]["here"])
        self.inside.step()

    @torch.no_grad()
    def negate(self) -> None:
        """Change the sign of zeros alone."""
        for p in self._trained():
            p.copy_(torch.where(p == 0, -p, p))

    def look(self) -> int:
        """Move nothing."""
        self.quiet += 1
        return self.quiet

    def fail(self) -> None:
        """Move, and raise."""
        self.first_step()
        raise ArithmeticError

    def train(self) -> None:
        """As schedule-free optimizers do."""
        self.first_step(1.0)

    def step(self, closure):
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()


class Problem:
    """A softmax policy, SAM and a wrapper around it."""

    def __init__(self, budget: float = 1e-3, controller=None, **options) -> None:
        torch.manual_seed(0)
        self.policy = nn.Linear(3, 4)
        self.inner = SAM(self.policy.parameters())
        self.optimizer = STEPOptimizer(
            self.inner, kl=PolicyKL(lambda: self.policy(SOME)), budget=budget, controller=controller, **options
        )

    def loss(self) -> torch.Tensor:
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.policy(SOME), LABELS)
        loss.backward()
        return loss

    def two_calls(self) -> None:
        self.loss()
        assert self.optimizer.first_step(rho=0.1) == "climbed"
        self.loss()
        self.optimizer.second_step()

    def moved(self, before: torch.Tensor) -> float:
        """The true KL from an earlier policy."""
        now = self.policy(SOME).detach().double().log_softmax(-1)
        return float((now.exp() * (now - before)).sum(-1).mean())

    def log_probabilities(self) -> torch.Tensor:
        return self.policy(SOME).detach().double().log_softmax(-1)


def warned(act) -> list[str]:
    """What a call warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        act()
    return [str(warning.message) for warning in caught]


def test_calls_that_move_weights_are_told_of_once_each() -> None:
    """The text names class, method and both remedies, and points to the caller's line."""
    problem = Problem()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        problem.two_calls()
        problem.two_calls()
    texts = [str(warning.message) for warning in caught]
    assert [text.split("(")[0] for text in texts] == ["SAM.first_step", "SAM.second_step"]
    for text in texts:
        assert OUTSIDE in text
        assert "use step(closure), or put the calls into `with optimizer.window():`" in text
    assert {warning.filename for warning in caught} == {__file__}


def test_calls_that_move_nothing_are_not_told_of() -> None:
    """Nor are modes, which the wrapper forwards; but one bit is enough, be it the sign of a zero."""
    problem = Problem()
    problem.loss()
    assert warned(lambda: problem.optimizer.look()) == []
    assert warned(problem.optimizer.train) == []
    assert warned(problem.optimizer.negate) == []
    with torch.no_grad():
        problem.policy.weight[0, 0] = 0.0
    assert len(warned(problem.optimizer.negate)) == 1
    with pytest.raises(ArithmeticError):
        problem.optimizer.fail()


@pytest.mark.parametrize("controller", [Gate, Interpolate])
@pytest.mark.parametrize("adaptive_rate", [False, True])
def test_in_a_window_such_calls_are_the_candidate(controller, adaptive_rate) -> None:
    """Even if `step()` is never called in it: it is audited, its budget holds, and a rejection leaves no trace."""
    problem = Problem(controller=controller(), adaptive_rate=adaptive_rate)
    for _ in range(6):
        before, state = problem.log_probabilities(), bits(dict(problem.inner.state))
        weights, groups = bits(list(problem.policy.parameters())), copy.deepcopy(problem.inner.param_groups[0])
        with problem.optimizer.window():
            assert warned(problem.two_calls) == []
        record = problem.optimizer.last
        assert record.action is not Action.UNCHANGED
        assert problem.moved(before) == reference.near(record.accepted.mean, rel=1e-4)
        assert record.accepted.mean <= 1e-3
        assert problem.inner.param_groups[0]["lr"] == 0.5
        if record.action is Action.REJECT:
            assert bits(list(problem.policy.parameters())) == weights
            assert bits(dict(problem.inner.state)) == state
            assert problem.inner.param_groups[0].get("calls") == groups.get("calls")
    if adaptive_rate:
        assert record.action is not Action.REJECT  # the rate is scaled in such calls, too


def test_a_window_of_such_calls_is_what_the_bare_optimizer_does() -> None:
    """With an infinite budget, bit for bit."""
    wrapped, bare = Problem(math.inf), Problem(math.inf)
    for _ in range(3):
        with wrapped.optimizer.window():
            wrapped.two_calls()
        bare.optimizer = bare.inner
        bare.two_calls()
    assert bits(list(wrapped.policy.parameters())) == bits(list(bare.policy.parameters()))


def test_a_loss_closure_may_make_such_calls() -> None:
    """They are a part of the inner step, which is audited."""
    problem = Problem()
    problem.loss()
    assert warned(lambda: problem.optimizer.step(lambda: problem.optimizer.first_step() and problem.loss())) == []
    assert problem.optimizer.last.accepted.mean <= 1e-3


def test_a_method_of_the_inner_optimizer_is_that_method_in_all_else() -> None:
    """Function, instance, equality, signature, docstring, pickles and copies."""
    problem = Problem()
    method = problem.optimizer.first_step
    assert isinstance(method, Watched)
    assert method.__func__ is SAM.first_step
    assert method.__self__ is problem.inner
    assert method == problem.inner.first_step
    assert problem.inner.first_step == method
    assert method == problem.optimizer.first_step
    assert method != problem.optimizer.second_step
    assert hash(method) == hash(problem.inner.first_step)
    assert inspect.signature(method) == inspect.signature(problem.inner.first_step)
    assert (method.__name__, method.__doc__) == ("first_step", SAM.first_step.__doc__)
    for copied in (copy.copy(method), copy.deepcopy(method), pickle.loads(pickle.dumps(method))):
        assert inspect.ismethod(copied)
        assert copied.__func__ is SAM.first_step
    assert copy.deepcopy(problem.optimizer).optimizer is not problem.inner
    assert problem.optimizer.quiet == 0
    assert not hasattr(problem.optimizer, "third_step")


@given(
    shape=st.lists(st.integers(0, 6), max_size=3).map(tuple),
    dtype=st.sampled_from(
        [torch.float32, torch.bfloat16, torch.float64, torch.complex64, torch.float8_e4m3fn, torch.int64, torch.bool]
    ),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_a_digest_is_of_all_bits(shape, dtype, seed, data) -> None:
    """One flipped bit, or two elements that change places, make another one; another layout does not."""
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randint(0, 2, shape, generator=generator).to(dtype)
    known = digest([tensor, torch.zeros(3)])
    assert digest([tensor.clone(), torch.zeros(3)]) == known
    if tensor.dim() > 1:
        assert digest([tensor.transpose(0, 1).contiguous().transpose(0, 1), torch.zeros(3)]) == known
    if tensor.numel() == 0:
        return
    raw = tensor.clone().reshape(-1)
    i = data.draw(st.integers(0, len(raw) - 1))
    if dtype is not torch.bool:
        flipped = raw.clone()
        view = flipped.view(torch.uint8)
        view[data.draw(st.integers(0, len(view) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        assert digest([flipped, torch.zeros(3)]) != known
    j = data.draw(st.integers(0, len(raw) - 1))
    raw[i], raw[j] = raw[j].clone(), raw[i].clone()
    same = bits(raw.reshape(shape)) == bits(tensor.clone().contiguous())
    assert (digest([raw, torch.zeros(3)]) == known) == same


def test_a_digest_is_of_more_than_one_block() -> None:
    """Blocks that change places make another one."""
    tensor = torch.randn(3, 2**16)
    assert digest([tensor]) != digest([tensor[[1, 0, 2]]])
    assert digest([tensor[0], tensor[1]]) != digest([tensor[1], tensor[0]])
    assert digest([]) == digest([torch.zeros(0)]) == digest([torch.zeros(3, device="meta")]) == 0


EDITS = {
    "nothing": lambda problem: None,
    "in place": lambda problem: nudge(problem.policy, 0.1),
    "through .data": lambda problem: problem.policy.weight.data.mul_(1.1),
    "other data": lambda problem: setattr(problem.policy.bias, "data", problem.policy.bias.data + 1),
    "a call of its own": lambda problem: problem.two_calls(),
    "the inner optimizer's step": lambda problem: problem.inner.inside.step(),
    "load_state_dict": lambda problem: problem.policy.load_state_dict(nn.Linear(3, 4).state_dict()),
    "refresh": lambda problem: problem.optimizer.refresh(),
    "bind": lambda problem: problem.optimizer.bind(PolicyKL(lambda: problem.policy(SOME))),
    "a new group": lambda problem: problem.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]}),
}
BY_SOMEBODY_ELSE = set(EDITS) - {"nothing", "refresh", "bind", "a new group"}


@pytest.mark.filterwarnings(f"ignore:SAM.*{OUTSIDE[:20]}")
@pytest.mark.parametrize("kl", ["PolicyKL", "function", "of one step"])
@pytest.mark.parametrize("edit", EDITS)
def test_weights_that_somebody_else_wrote_are_in_the_record(tmp_path, edit, kl) -> None:
    """`reference_renewed`, counted in the summary; not where we were told to take it anew, nor in the first step."""
    problem = Problem(math.inf, log=tmp_path / "run.jsonl")
    options = {}
    if kl == "function":
        problem.optimizer.bind(lambda: 0.0)
    if kl == "of one step":
        options = {"kl": lambda: 0.0}

    def step() -> bool:
        problem.loss()
        problem.optimizer.step(problem.loss, **options)
        return problem.optimizer.last.reference_renewed

    assert [step(), step()] == [False, False]
    EDITS[edit](problem)
    expected = edit in BY_SOMEBODY_ELSE
    assert [step(), step()] == [expected, False]
    assert problem.optimizer.summary()["references_renewed"] == expected
    assert summarise(read_log(tmp_path / "run.jsonl"))["references_renewed"] == expected


def test_training_forwards_of_batch_norm_are_no_edit_of_the_weights() -> None:
    """The reference is taken anew after them, and nobody has written weights."""
    torch.manual_seed(0)
    policy = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    frozen = policy[0].bias.requires_grad_(False)
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = STEPOptimizer(torch.optim.SGD(trained, lr=0.1), kl=PolicyKL(lambda: policy(SOME)), budget=1.0)
    renewed = []
    for step in range(4):
        if step == 2:
            frozen.data.add_(1.0)  # a weight that the optimizer does not have
        policy(SOME).square().mean().backward()
        optimizer.step()
        renewed.append(optimizer.last.reference_renewed)
    assert renewed == [False, False, True, False]


def idle(optimizer: STEPOptimizer, **options) -> list[str]:
    return [text for text in warned(lambda: optimizer.step(**options)) if text.startswith("the step moved nothing")]


def test_a_step_without_any_gradient_is_told_of_once() -> None:
    """With the number of parameters, of frozen ones, and the remedy: PEFT has replaced or frozen them."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = STEPOptimizer(
        torch.optim.AdamW(model.parameters(), lr=0.1), kl=PolicyKL(lambda: model(SOME)), budget=Budget(mean=1.0)
    )
    model[0].requires_grad_(False)
    (text,) = idle(optimizer)
    assert optimizer.last.action is Action.UNCHANGED
    for words in ("none of the optimizer's 4 parameters", "2 of them do not require one", "trainer.create_optimizer()"):
        assert words in text
    assert idle(optimizer) == []


@pytest.mark.parametrize(
    "reason", ["zero gradients", "no rate", "loss closure", "one gradient", "no inner step", "gradients within"]
)
def test_steps_that_have_a_reason_to_move_nothing_are_not_told_of(reason) -> None:
    """torch.distributed.checkpoint steps on zero gradients; a warm-up begins at a rate of 0; a window may be empty."""
    policy = nn.Linear(3, 4)
    optimizer = STEPOptimizer(
        torch.optim.SGD(policy.parameters(), lr=0.0 if "rate" in reason or "within" in reason else 0.1),
        kl=PolicyKL(lambda: policy(SOME)),
        budget=1.0,
    )
    if reason in ("zero gradients", "one gradient"):
        policy.bias.grad = torch.zeros(4)
    if reason in ("zero gradients", "no rate"):
        policy.weight.grad = torch.full((4, 3), 0.0 if reason == "zero gradients" else 1.0)
    if reason == "loss closure":
        assert idle(optimizer, closure=lambda: torch.zeros(())) == []
    elif reason in ("no inner step", "gradients within"):

        def window() -> None:
            with optimizer.window():
                if reason == "gradients within":
                    policy.bias.grad = torch.ones(4)
                    optimizer.step()
                    optimizer.zero_grad()

        assert warned(window) == []
    else:
        assert idle(optimizer) == []
    assert optimizer.last.action is Action.UNCHANGED
