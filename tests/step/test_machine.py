"""Any order of steps, rejects, shrinks, projections, saves, loads, new groups, budgets and outside edits."""

from __future__ import annotations

import copy
import math

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from step_optim import Action, Budget, Controller, Gate, Interpolate, Project, Steer, STEPOptimizer, TokenKL
from tests.strategies import bits, picture, token_problem

TIGHT = 1e-7


class Training(RuleBasedStateMachine):
    """A language model in training; after every rule, the invariants of the transaction hold."""

    def __init__(self) -> None:
        super().__init__()
        self.data_step = 0
        self.budget = Budget(mean=math.inf)
        self.saved: tuple[dict, dict, int, object] | None = None

    @initialize(
        seed=st.integers(0, 100),
        inner=st.sampled_from(["AdamW", "SGD", "NAdam", "ASGD"]),
        freeze_head=st.booleans(),
        controller=st.sampled_from(
            [Gate(), Gate(patience=1), Interpolate(), Interpolate("bisect"), Project(steps=1), Steer(corrections=1)]
        ),
    )
    def start(self, seed: int, inner: str, freeze_head: bool, controller: Controller) -> None:
        self.problem = token_problem(seed, inner=inner, freeze_head=freeze_head)
        self.optimizer = STEPOptimizer(
            self.problem.optimizer, kl=self.problem.kl, budget=self.budget, controller=copy.deepcopy(controller)
        )
        self.steps = 0
        self.trained_last = False

    def _policy(self) -> object:
        """The current policy, measured by a KL closure of its own."""
        self.observer = TokenKL(self.problem.model, self.problem.kl.control, check_parameters=False)
        self.observer.anchor()
        return self.observer

    def _step(self, run) -> None:
        before = picture(self.problem.model, self.optimizer)
        observer = self._policy()
        run()
        record = self.optimizer.last
        assert record.step == self.steps
        self.steps += 1
        self.trained_last = True
        seen = observer()
        if record.action in (Action.REJECT, Action.UNCHANGED):
            assert seen.mean == record.accepted.mean == 0
        if record.action is Action.REJECT:
            after = picture(self.problem.model, self.optimizer)
            assert after == before
        else:
            assert seen == record.accepted
            assert record.budget.judge(seen, record.reference_drift).feasible

    @rule()
    def step(self) -> None:
        self.data_step += 1
        self.problem.backward(self.data_step)
        self._step(self.optimizer.step)

    @rule(parts=st.integers(1, 3))
    def window(self, parts: int) -> None:
        def run() -> None:
            with self.optimizer.window():
                for _ in range(parts):
                    self.data_step += 1
                    self.problem.backward(self.data_step)
                    self.optimizer.step()

        self.problem.backward(self.data_step)
        self._step(run)

    @rule(mean=st.sampled_from([math.inf, 1.0, 1e-3, TIGHT, 0.0]), slices=st.sampled_from([None, 1e-2, TIGHT]))
    def set_budget(self, mean: float, slices: float | None) -> None:
        self.budget = Budget(mean=mean, slices=slices)
        self.optimizer.set_budget(self.budget)

    @rule(amount=st.floats(-0.1, 0.1), through_data=st.booleans())
    def outside_edit(self, amount: float, through_data: bool) -> None:
        weight = self.problem.model.embed.weight
        with torch.no_grad():
            (weight.data if through_data else weight).add_(amount)

    @rule()
    def frozen_edit(self) -> None:
        with torch.no_grad():
            self.problem.model.lm_head.bias.add_(torch.linspace(0, 0.05, 13))

    @precondition(lambda self: len(self.optimizer.param_groups) < 3)
    @rule()
    def add_param_group(self) -> None:
        extra = torch.nn.Parameter(torch.zeros(2))
        self.problem.model.register_parameter(f"extra{len(self.optimizer.param_groups)}", extra)
        self.optimizer.add_param_group({"params": [extra], "lr": 0.5})
        extra.grad = torch.ones(2)

    @rule()
    def save(self) -> None:
        self.saved = (
            copy.deepcopy(self.problem.model.state_dict()),
            copy.deepcopy(self.optimizer.state_dict()),
            self.steps,
            len(self.optimizer.param_groups),
        )

    @precondition(lambda self: self.saved is not None and self.saved[3] == len(self.optimizer.param_groups))
    @rule()
    def load(self) -> None:
        model, state, steps, _ = self.saved
        self.problem.model.load_state_dict(model)
        self.optimizer.load_state_dict(copy.deepcopy(state))
        self.steps = steps

    @rule()
    def refresh(self) -> None:
        self.optimizer.refresh()

    @invariant()
    def weights_are_finite(self) -> None:
        if hasattr(self, "problem"):
            assert all(p.isfinite().all() for p in self.problem.model.parameters())

    @invariant()
    def counters_add_up(self) -> None:
        if hasattr(self, "optimizer"):
            summary = self.optimizer.summary()
            parts = ("commits", "rejects", "shrinks", "projects", "steers", "unchanged")
            assert sum(summary[part] for part in parts) == summary["steps"] == self.steps

    @invariant()
    def state_dict_round_trips(self) -> None:
        if hasattr(self, "optimizer"):
            state = self.optimizer.state_dict()
            assert set(state) == {"state", "param_groups", "step_optim"}
            assert bits(state["step_optim"]) == bits(copy.deepcopy(state)["step_optim"])


Training.TestCase.settings = settings(max_examples=25, stateful_step_count=15, deadline=None)
TestTraining = Training.TestCase
