"""State dicts, torch.distributed.checkpoint, copies: what is saved is what a bare optimizer saves, and goes on."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, get_state_dict, set_state_dict

from step_optim import Action, Budget, Gate, Interpolate, PolicyKL, STEPOptimizer
from tests.hosts.common import check_host, everything
from tests.hosts.loops import INF, OBSERVATIONS, Net, adamw, train
from tests.strategies import bits, picture

# -- distributed checkpoint in one process -------------------------------------------------------------------------

single_process = pytest.mark.filterwarnings("ignore:torch.distributed is (disabled, )?unavailable or uninitialized")


def fresh(seed: int, budget: Budget | float = INF, **options: Any) -> tuple[Net, STEPOptimizer]:
    torch.manual_seed(seed)
    model = Net()
    kl = PolicyKL(lambda: model(OBSERVATIONS))
    return model, STEPOptimizer(adamw(model), kl=kl, budget=budget, **options)


def strip(state: dict[str, Any]) -> Any:
    """A flattened optimizer state without the order of its entries."""
    return {name: bits(value) for name, value in state["state"].items()}, [
        bits(dict(sorted(group.items()))) for group in state["param_groups"]
    ]


def test_dcp_state_dicts_are_those_of_a_bare_optimizer():
    """get_optimizer_state_dict names parameters, drops the extra key, and is the same with and without STEP."""

    def loop(wrap):
        model = Net()
        optimizer = wrap(adamw(model), lambda: model(OBSERVATIONS))
        train(model, optimizer, range(3))
        state = get_optimizer_state_dict(model, optimizer)
        assert set(state) == {"state", "param_groups"}
        assert state["state"].keys() == (dict(model.named_parameters()).keys() if optimizer.state else set())
        return everything(model, optimizer, flat=strip(state))

    check_host(loop)


@pytest.mark.parametrize("controller", [Gate, Interpolate])
@pytest.mark.parametrize("budget", [math.inf, 0.0])
def test_dcp_dummy_steps_make_real_state_without_an_audit(budget, controller):
    """torch.distributed.checkpoint steps with zero gradients and lr 0 to create state; no budget may undo that."""
    calls = 0
    torch.manual_seed(0)
    model = Net()

    class Counted(PolicyKL):
        def audit(self):
            nonlocal calls
            calls += 1
            return super().audit()

    optimizer = STEPOptimizer(
        adamw(model), kl=Counted(lambda: model(OBSERVATIONS)), budget=budget, controller=controller()
    )
    before = bits(list(model.parameters()))
    state = get_optimizer_state_dict(model, optimizer)
    assert calls == 0
    assert bits(list(model.parameters())) == before
    assert optimizer.last.action is Action.UNCHANGED
    assert set(state["state"]["head.weight"]) == {"step", "exp_avg", "exp_avg_sq"}
    assert len(optimizer.optimizer.state) == len(list(model.parameters()))
    assert optimizer.param_groups[0]["lr"] == 0.02
    assert all(p.grad is None for p in model.parameters())


def test_dcp_dummy_steps_need_no_kl_closure():
    """A checkpoint may be loaded before `bind`: a step that moves nothing has nothing to measure, any other has."""
    torch.manual_seed(0)
    model = Net()
    optimizer = STEPOptimizer(adamw(model), budget=1.0)
    state = get_optimizer_state_dict(model, optimizer)
    assert set(state["state"]["head.weight"]) == {"step", "exp_avg", "exp_avg_sq"}
    with pytest.raises(RuntimeError, match="bind"):
        train(model, optimizer, range(1))
    optimizer.bind(PolicyKL(lambda: model(OBSERVATIONS)))
    train(model, optimizer, range(1))
    assert optimizer.last.action is Action.COMMIT


def record_of(optimizer: STEPOptimizer, whole: bool) -> dict[str, Any]:
    """The latest record without times; or the part that does not depend on counters and pi_ref."""
    plain = optimizer.last.to_dict() | {"seconds": None}
    parts = plain if whole else ("action", "candidate", "accepted", "alpha", "trials", "update_norm")
    return {name: plain[name] for name in parts}


@single_process
@pytest.mark.parametrize("budget", [math.inf, 1e-4])
@pytest.mark.parametrize("whole", [True, False])
def test_dcp_save_and_load(tmp_path, budget, whole):
    """A run through torch.distributed.checkpoint goes on to the bit; counters and searches need a file beside."""
    model, optimizer = fresh(0, budget)
    optimizer.controller = Interpolate(memory=whole)
    train(model, optimizer, range(4))
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=tmp_path)
    torch.save(optimizer.state_dict()["step_optim"], tmp_path / "step_optim.pt")  # DCP drops it
    rng = torch.get_rng_state()
    expected = []
    train(model, optimizer, range(4, 8), after=lambda _: expected.append(record_of(optimizer, whole)))

    again, resumed = fresh(1, budget)
    resumed.controller = Interpolate(memory=whole)
    weights, state = get_state_dict(again, resumed)
    target = {"model": weights, "optimizer": state}
    dcp.load(target, checkpoint_id=tmp_path)
    set_state_dict(again, resumed, model_state_dict=target["model"], optim_state_dict=target["optimizer"])
    if whole:
        own = torch.load(tmp_path / "step_optim.pt", weights_only=True)
        resumed.load_state_dict(resumed.optimizer.state_dict() | {"step_optim": own})
    torch.set_rng_state(rng)
    seen = []
    train(again, resumed, range(4, 8), after=lambda _: seen.append(record_of(resumed, whole)))
    assert seen == expected
    assert everything(again, resumed) == everything(model, optimizer)
    assert ("shrink" in {plain["action"] for plain in expected}) == (budget < 1)
    if whole:
        assert resumed.summary()["steps"] == optimizer.summary()["steps"] == 8


def test_state_passes_by_keyword():
    """DCP and others call load_state_dict(state_dict=...)."""
    model, optimizer = fresh(0, 1e-3)
    train(model, optimizer, range(2))
    state = copy.deepcopy(optimizer.state_dict())
    _, other = fresh(0)
    other.load_state_dict(state_dict=state)
    assert bits(other.state_dict()) == bits(state)


# -- copies --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("budget", [math.inf, 1e-4])
def test_a_copy_goes_on_as_the_original(way, budget):
    """Model and optimizer copied together in the middle of training: weights, decisions and counters agree."""
    model, optimizer = fresh(0, budget)
    train(model, optimizer, range(3))
    rng = torch.get_rng_state()
    if way == "deepcopy":
        twin, copied = copy.deepcopy((model, optimizer))
    elif way == "pickle":
        twin, copied = pickle.loads(pickle.dumps((model, optimizer)))
    else:
        file = io.BytesIO()
        torch.save((model, optimizer), file)
        twin, copied = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    assert copied.param_groups[0]["params"][0] is next(iter(twin.parameters()))
    assert copied.last == optimizer.last
    copied.bind(PolicyKL(lambda: twin(OBSERVATIONS)))
    train(model, optimizer, range(3, 6))
    torch.set_rng_state(rng)
    train(twin, copied, range(3, 6))
    assert copied.last.to_dict() | {"seconds": None} == optimizer.last.to_dict() | {"seconds": None}
    assert everything(twin, copied) == everything(model, optimizer)
    assert copied.summary()["steps"] == 6
    assert (optimizer.last.action is Action.SHRINK) == (budget < 1)


def test_a_copy_inside_a_run_shares_nothing():
    """Training the original leaves the copy as it was."""
    model, optimizer = fresh(0, 1e-3)
    train(model, optimizer, range(2))
    twin, copied = copy.deepcopy((model, optimizer))
    before = picture(twin, copied, rng=False)
    train(model, optimizer, range(2, 4))
    assert picture(twin, copied, rng=False) == before
    assert copied.summary()["steps"] == 2
