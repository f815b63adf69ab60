"""A default device of the host's reaches nothing that the library makes."""

from __future__ import annotations

import pytest
import torch

from step_optim import Budget, Controller, ControlSet, Gate, Interpolate, Project, STEPOptimizer, TokenKL
from tests.models import chatty_control, tiny_llama
from tests.strategies import bits, policy_problem, token_problem

BUDGET = Budget(mean=1e-3, slices=1e-3)


def outcome(problem, controller: Controller, device: str) -> tuple[list, object]:
    """Records and weights of a few steps, with another default device around everything that is the library's."""
    made, records = problem(), []
    optimizer = STEPOptimizer(made.optimizer, kl=made.kl, budget=BUDGET, controller=controller)
    for step in range(3):
        made.backward(step)
        with torch.device(device):
            optimizer.step()
        records.append(optimizer.last.to_dict() | {"seconds": None})
    return records, bits(dict(made.model.state_dict()))


@pytest.mark.parametrize("controller", [Gate(), Interpolate(), Project(steps=1)], ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("problem", [policy_problem, token_problem])
def test_a_run_is_the_same_under_a_default_device(problem, controller) -> None:
    """Records and weights are bit for bit those of a run without one."""
    assert outcome(problem, controller, "meta") == outcome(problem, controller, "cpu")


def test_closures_and_control_sets_are_made_where_they_belong(tmp_path) -> None:
    """Ids without a device are on the CPU; a closure that is made under a default device reads the same."""
    model, control = tiny_llama(), chatty_control()
    plain = TokenKL(model, control)
    with torch.device("meta"):
        assert ControlSet.from_ids([[1, 2]], [[3]]).device.type == "cpu"
        kept, held_out = control.split(0.5)
        assert len(kept) + len(held_out) == len(control)
        control.save(tmp_path / "control.json")
        assert ControlSet.load(tmp_path / "control.json").digest == control.digest
        kl = TokenKL(model, control)
        kl.anchor()
        assert kl().mean == 0.0
    assert (kl.readout, kl.prefix_tokens, kl.noise_floor) == (plain.readout, plain.prefix_tokens, plain.noise_floor)
