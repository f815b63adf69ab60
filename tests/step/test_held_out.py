"""Held-out audits: right figures at every n-th step, and no influence on anything else."""

import copy
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from step_optim import Action, Budget, ControlSet, Gate, Interpolate, PolicyKL, STEPOptimizer, TokenKL, summarise
from step_optim.movement import Movement
from step_optim.precision import student_quantile
from step_optim.telemetry import read_log
from tests import reference
from tests.strategies import Bigram

pytestmark = pytest.mark.filterwarnings("ignore:held-out prompts")


def tokens(start: int, count: int) -> list[int]:
    return [(start + 3 * k) % 13 for k in range(count)]


CONTROL = ControlSet.from_ids([tokens(i, 2) for i in range(4)], [tokens(i + 4, 3) for i in range(4)], {"a": [0, 1]})
POOL = ControlSet.from_ids([tokens(i, 3) for i in range(6)], [tokens(i + 1, 4) for i in range(6)], {"a": [0, 1]})
ELSEWHERE = ControlSet.from_ids([tokens(i, 4) for i in range(5)], [tokens(i + 2, 2 + i) for i in range(5)], {"b": [4]})


class Run:
    """A small language model in training; equal arguments make equal runs."""

    def __init__(self, *, lr: float = 1.0, budget: float = math.inf, controller=None, seed: int = 0, **options) -> None:
        torch.manual_seed(seed)
        self.model = Bigram()
        log = options.pop("log", None)
        self.kl = TokenKL(self.model, CONTROL, noise_floor=False, **options)
        inner = torch.optim.Adam(self.model.parameters(), lr=lr)
        self.optimizer = STEPOptimizer(
            inner, kl=self.kl, budget=budget, controller=controller or Interpolate(), log=log
        )

    def step(self):
        ids = torch.randint(13, (4, 6))
        logits = self.model(ids)
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return self.optimizer.last

    def bits(self):
        state = self.optimizer.optimizer.state_dict()
        return copy.deepcopy((self.model.state_dict(), state, torch.get_rng_state()))


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("every", [1, 3])
def test_figures_equal_the_oracle(every) -> None:
    """At every n-th step, of the step and of the drift, whatever was made of the candidate."""
    run = Run(lr=0.02, budget=1e-4, held_out=ELSEWHERE, every=every)
    origin, triggered = reference.policy_of(run.model, ELSEWHERE), 0
    for t in range(7):
        before = reference.policy_of(run.model, ELSEWHERE)
        last = run.step()
        if t % every != every - 1:
            assert last.held_out is last.held_out_drift is None
            assert not last.generalisation
            continue
        after = reference.policy_of(run.model, ELSEWHERE)
        moved, drift = (reference.movement(after, old, ELSEWHERE.slices) for old in (before, origin))
        for found, wanted in ((last.held_out, moved), (last.held_out_drift, drift)):
            assert found.mean == reference.near(wanted.mean, 1e-3)
            assert found.slices["b"] == reference.near(wanted.slices["b"], 1e-3)
        assert last.generalisation["step"] == last.held_out.mean / last.accepted.mean
        assert last.generalisation["drift"] == last.held_out_drift.mean / last.reference_drift.mean
        spread = math.hypot(last.held_out.precision.mean, last.accepted.precision.mean)
        assert last.generalisation["step_error"] == pytest.approx(spread * student_quantile(0.975, 3) / 1.959964)
        triggered += last.triggered
    assert triggered


@given(
    seed=st.integers(0, 20),
    budget=st.sampled_from([1e-5, 1e-3, math.inf]),
    every=st.integers(1, 3),
    controller=st.sampled_from([Gate(), Interpolate()]),
)
@settings(max_examples=15, deadline=None)
def test_it_decides_nothing(seed, budget, every, controller) -> None:
    """Weights, optimizer state and random streams are those of a run without it, to the bit."""
    ends = []
    for options in ({}, {"held_out": ELSEWHERE, "every": every}):
        run = Run(lr=0.1, budget=budget, controller=controller, seed=seed, **options)
        actions = [run.step().action for _ in range(5)]
        ends.append((actions, run.bits()))
    assert same(*ends)


def test_a_rejected_step_moves_nothing_there() -> None:
    run = Run(lr=1.0, budget=1e-9, controller=Gate(), held_out=ELSEWHERE, every=1)
    last = run.step()
    assert last.action is Action.REJECT
    assert last.held_out == Movement(0.0, {"b": 0.0})
    assert "step" not in last.generalisation


def test_a_window_is_measured_as_one() -> None:
    run = Run(lr=0.05, held_out=ELSEWHERE, every=1)
    before = reference.policy_of(run.model, ELSEWHERE)
    with run.optimizer.window():
        for _ in range(3):
            run.step()
    moved = reference.movement(reference.policy_of(run.model, ELSEWHERE), before, {})
    assert run.optimizer.last.held_out.mean == reference.near(moved.mean, 1e-3)


def test_a_resumed_run_goes_on_to_the_bit() -> None:
    """Drift there is still from where training began."""
    whole = Run(lr=0.05, budget=1e-3, held_out=ELSEWHERE, every=2)
    for _ in range(3):
        whole.step()
    state = copy.deepcopy((whole.model.state_dict(), whole.optimizer.state_dict(), torch.get_rng_state()))
    wanted = [whole.step() for _ in range(3)]
    resumed = Run(lr=0.05, budget=1e-3, held_out=ELSEWHERE, every=2, seed=5)
    resumed.model.load_state_dict(state[0])
    resumed.optimizer.load_state_dict(state[1])
    torch.set_rng_state(state[2])
    for record in wanted:
        last = resumed.step()
        assert (last.held_out, last.held_out_drift) == (record.held_out, record.held_out_drift)
        assert dict(last.generalisation) == dict(record.generalisation)
    mine, its = whole.optimizer.summary(), resumed.optimizer.summary()
    assert {k: v for k, v in mine.items() if "seconds" not in k and "share" not in k} == {
        k: v for k, v in its.items() if "seconds" not in k and "share" not in k
    }
    with pytest.raises(ValueError, match="the checkpoint was saved without held_out="):
        bare = Run(lr=0.05)
        bare.step()
        Run(lr=0.05, held_out=ELSEWHERE).optimizer.load_state_dict(bare.optimizer.state_dict())


def test_the_summary_has_ratios_with_intervals(tmp_path) -> None:
    """The geometric mean over measured steps, the latest drift; a log says the same."""
    path = tmp_path / "run.jsonl"
    run = Run(lr=0.05, held_out=ELSEWHERE, every=1, log=path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        records = [run.step() for _ in range(4)]
    ratios = [record.generalisation["step"] for record in records]
    errors = [record.generalisation["step_error"] for record in records]
    figures = run.optimizer.summary()
    mean = math.prod(ratios) ** (1 / 4)
    spread = math.exp(1.959964 * math.sqrt(sum(e**2 for e in errors) / 4))
    assert figures["generalisation_step"] == pytest.approx(mean)
    assert figures["generalisation_step_low"] == pytest.approx(mean / spread)
    assert figures["generalisation_step_high"] == pytest.approx(mean * spread)
    assert figures["generalisation_drift"] == records[-1].generalisation["drift"]
    written = list(read_log(path))
    assert written == records
    assert [r.held_out.token for r in written] == [r.held_out.token for r in records]
    again = summarise(written)
    assert {k: v for k, v in again.items() if k.startswith("general")} == {
        k: v for k, v in figures.items() if k.startswith("general")
    }
    assert Run().optimizer.summary()["generalisation_step"] is None


@pytest.mark.parametrize("far", [True, False])
def test_figures_that_do_not_carry_are_told_of_once(far) -> None:
    """With the interval and the remedy; not where held-out prompts move as far as the control set."""
    torch.manual_seed(0)
    layer, inputs = nn.Linear(4, 3), torch.randn(12, 4)
    there = (3.0 if far else 1.0) * inputs.flip(0)
    kl = PolicyKL(lambda: layer(inputs), noise_floor=False, held_out=lambda: layer(there), every=1)
    optimizer = STEPOptimizer(torch.optim.SGD(layer.parameters(), lr=0.1), kl=kl, budget=Budget(mean=math.inf))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            layer.weight.grad, layer.bias.grad = torch.randn(3, 4), torch.zeros(3)
            optimizer.step()
    texts = [str(w.message) for w in caught]
    moved = [text for text in texts if text.startswith("held-out prompts moved")]
    drifted = [text for text in texts if text.startswith("held-out prompts drifted")]
    assert len(moved) == len(drifted) == int(far)
    if far:
        assert "times as far as the control set (95 % interval" in moved[0]
        assert "more prompts of their kinds" in moved[0]
        assert "pool=" in moved[0]


def test_an_error_there_leaves_nothing_half_done() -> None:
    run = Run(lr=0.05, held_out=ELSEWHERE, every=1)
    run.step()
    before = run.bits()

    def fail(*_):
        raise RuntimeError("no")

    run.kl.held_out.audit_with_drift = fail
    with pytest.raises(RuntimeError, match="no"):
        run.step()
    after = run.bits()
    assert same(before[:2], after[:2])


@pytest.mark.parametrize("method", ["anchor", "audit_with_drift"])
def test_an_error_there_rejects_no_step_where_errors_are_not_raised(method) -> None:
    """The record has it, and the step goes on as if there were no held-out prompts."""
    bare = Run(lr=0.05)
    bare.step(), bare.step()
    wanted = bare.bits()
    run = Run(lr=0.05, held_out=ELSEWHERE, every=1)
    run.optimizer._on_error = "reject"
    run.step()

    def fail(*_):
        raise RuntimeError("no")

    setattr(run.kl.held_out, method, fail)
    last = run.step()
    assert last.action is Action.COMMIT
    assert last.held_out is None
    assert last.held_out_error == "RuntimeError: no"
    assert (last.error, last.success, last.shows_movement) == (None, True, True)
    assert run.optimizer.summary()["errors"] == 1
    assert same(run.bits(), wanted)


def test_few_prompts_raise_no_alarm() -> None:
    """From one distribution, a ratio above 1.5 happens; its interval says that it says nothing."""
    for seed in range(5):
        torch.manual_seed(seed)
        layer, inputs, there = nn.Linear(4, 3), torch.randn(2, 4), torch.randn(2, 4)
        kl = PolicyKL(lambda: layer(inputs), noise_floor=False, held_out=lambda: layer(there), every=1)  # noqa: B023
        optimizer = STEPOptimizer(torch.optim.SGD(layer.parameters(), lr=0.1), kl=kl, budget=Budget(mean=math.inf))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(4):
                layer.weight.grad, layer.bias.grad = torch.randn(3, 4), torch.zeros(3)
                optimizer.step()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"every": 5}, ValueError, "every=5 has no effect without held_out="),
        ({"held_out": CONTROL.select([1])}, ValueError, "prompt 0 of the held-out set is prompt 1 of the control set"),
        (
            {"held_out": POOL.select([2]), "pool": POOL},
            ValueError,
            "prompt 0 of the held-out set is prompt 2 of the pool",
        ),
        ({"held_out": [[1, 2]]}, TypeError, "held_out=.* is no ControlSet"),
        ({"held_out": ControlSet.from_ids([[99]], [[1]])}, ValueError, "outside the vocabulary"),
        ({"held_out": ELSEWHERE, "every": 0}, ValueError, "every=0 must be a whole number of steps"),
        ({"held_out": ELSEWHERE, "every": 2.5}, ValueError, r"every=2.5 must be a whole number of steps"),
    ],
)
def test_bad_input_is_refused_at_construction(options, error, message) -> None:
    with pytest.raises(error, match=message):
        TokenKL(Bigram(), CONTROL, noise_floor=False, **options)
