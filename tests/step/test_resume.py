"""After a resume the continued run is bit-identical to the uninterrupted one."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from step_optim import Budget, Gate, Interpolate, Project, Steer, STEPOptimizer, read_log
from tests.strategies import INNER, bits, picture, policy_problem, token_problem, wrap


def checkpoint(problem, optimizer) -> bytes:
    file = io.BytesIO()
    torch.save(
        {"model": problem.model.state_dict(), "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}, file
    )
    return file.getvalue()


@given(
    stop=st.integers(1, 6),
    inner=st.sampled_from(sorted(INNER)),
    controller=st.sampled_from([Gate(patience=2), Interpolate(), Project(steps=1), Steer(corrections=1)]),
    build=st.sampled_from([token_problem, policy_problem]),
    freeze_head=st.booleans(),
)
def test_a_resumed_run_is_the_uninterrupted_one(stop, inner, controller, build, freeze_head):
    """Weights, state, decisions, drift and counters agree to the bit; the checkpoint loads with weights_only=True."""
    options = {"inner": inner} | ({"freeze_head": freeze_head} if build is token_problem else {})
    budget = Budget(mean=2e-4, slices=5e-4)

    def run(problem, optimizer, steps):
        records = []
        for step in steps:
            problem.backward(step)
            optimizer.step()
            records.append(optimizer.last.to_dict() | {"seconds": None})
        return records

    whole = build(11, **options)
    whole_optimizer = wrap(whole, budget, controller)
    torch.manual_seed(5)
    expected = run(whole, whole_optimizer, range(8))

    first = build(11, **options)
    first_optimizer = wrap(first, budget, controller)
    torch.manual_seed(5)
    run(first, first_optimizer, range(stop))
    saved = torch.load(io.BytesIO(checkpoint(first, first_optimizer)), weights_only=True)

    second = build(11, **options)
    with torch.no_grad():  # another start: all of it has to come from the checkpoint
        for p in second.model.parameters():
            p.uniform_()
    second.model.load_state_dict(saved["model"])
    second_optimizer = wrap(second, budget, controller)
    second_optimizer.load_state_dict(saved["optimizer"])
    torch.set_rng_state(saved["rng"])
    assert run(second, second_optimizer, range(stop, 8)) == expected[stop:]
    a, b = picture(second.model, second_optimizer), picture(whole.model, whole_optimizer)
    for part in ("parameters", "buffers", "groups", "rng"):
        assert a[part] == b[part]
    assert bits(list(second.optimizer.state.values())) == bits(list(whole.optimizer.state.values()))
    figures = ("steps", "commits", "rejects", "shrinks", "projects", "mean_alpha", "max_accepted_kl", "reference_drift")
    left, right = second_optimizer.summary(), whole_optimizer.summary()
    assert {name: left[name] for name in figures} == {name: right[name] for name in figures}


def test_checkpoints_of_wrapped_and_bare_optimizers_are_interchangeable():
    """A bare optimizer's checkpoint loads into the wrapper, and the wrapper's into a bare one."""
    problem = policy_problem(0)
    optimizer = wrap(problem, Budget(mean=math.inf))
    problem.backward(0)
    optimizer.step()
    wrapped_state = copy.deepcopy(optimizer.state_dict())
    bare = torch.optim.AdamW(problem.model.parameters(), lr=1.0)
    bare.load_state_dict(wrapped_state)
    assert bits(list(bare.state.values())) == bits(list(problem.optimizer.state.values()))
    again = STEPOptimizer(torch.optim.AdamW(problem.model.parameters(), lr=1.0), kl=problem.kl, budget=1.0)
    again.load_state_dict(state_dict=copy.deepcopy(bare.state_dict()))
    assert bits(list(again.state.values())) == bits(list(bare.state.values()))
    assert again.param_groups[0]["lr"] == 0.05
    assert again.summary()["steps"] == 0


def test_a_checkpoint_may_be_loaded_before_the_kl_closure_is_bound():
    """pi_ref waits for bind(): the drift goes on from the start of training."""
    problem = token_problem(3)
    optimizer = wrap(problem, Budget(mean=math.inf))
    for step in range(3):
        problem.backward(step)
        optimizer.step()
    drift = optimizer.last.reference_drift
    late = STEPOptimizer(torch.optim.AdamW(problem.model.parameters(), lr=0.0), budget=1.0)
    late.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for group in late.param_groups:
        group["lr"] = 0.0
    fresh = type(problem.kl)(problem.model, problem.kl.control)
    late.bind(fresh)
    late.step()
    assert late.last.reference_drift == drift
    assert late.last.step == 3


def test_another_control_set_is_refused_on_resume():
    """pi_ref belongs to the control set that it was measured on."""
    problem = token_problem(3)
    optimizer = wrap(problem, Budget(mean=math.inf))
    problem.backward(0)
    optimizer.step()
    smaller = type(problem.kl)(problem.model, problem.kl.control.select([0, 1]))
    other = STEPOptimizer(torch.optim.AdamW(problem.model.parameters()), kl=smaller, budget=1.0)
    with pytest.raises(ValueError, match="control set"):
        other.load_state_dict(optimizer.state_dict())


def test_a_resumed_log_continues_and_replaces_the_lost_steps(tmp_path):
    """Steps that were logged after the checkpoint are run again: the log reads as one run."""
    path = tmp_path / "run.jsonl"
    problem = token_problem(3)
    optimizer = wrap(problem, Budget(mean=1e-4), log=path)
    for step in range(5):
        problem.backward(step)
        optimizer.step()
        if step == 2:
            saved = checkpoint(problem, optimizer)
    first = read_log(path)
    saved = torch.load(io.BytesIO(saved), weights_only=True)
    again = token_problem(3)
    again.model.load_state_dict(saved["model"])
    resumed = wrap(again, Budget(mean=1e-4), log=path)
    resumed.load_state_dict(saved["optimizer"])
    for step in range(3, 7):
        again.backward(step)
        resumed.step()
    records = read_log(path)
    assert [record.step for record in records] == list(range(7))
    for old, new in zip(first, records, strict=False):
        assert (old.accepted, old.action, old.alpha) == (new.accepted, new.action, new.alpha)
