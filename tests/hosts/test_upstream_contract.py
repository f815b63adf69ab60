"""What the test suites of torch, Lightning, accelerate and pytorch_optimizer expect of any optimizer.

Each test stands for one expectation on which a wrapped run of these suites once differed from the bare run. At an
infinite budget they pass wrapped as they pass bare, but for tests of class names, of private attributes, and of
``.optimizer`` on optimizers that have an inner one themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from copy import deepcopy
from unittest.mock import call, patch

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from step_optim import Action, Gate, Interpolate, STEPOptimizer
from tests.strategies import bits


def weight(*shape: int) -> nn.Parameter:
    """A parameter with a gradient of ones."""
    parameter = nn.Parameter(torch.ones(shape or (3,)))
    parameter.grad = torch.ones_like(parameter)
    return parameter


def wrap(optimizer: torch.optim.Optimizer, **options) -> STEPOptimizer:
    return STEPOptimizer(optimizer, **{"kl": lambda: 0.0, "budget": math.inf, **options})


# -- torch: test_optim.py ----------------------------------------------------------------------------------------------


@pytest.fixture
def global_hooks() -> Iterator[list[tuple[str, torch.optim.Optimizer]]]:
    """What torch's global step hooks were called with."""
    calls: list[tuple[str, torch.optim.Optimizer]] = []
    handles = [
        register_optimizer_step_pre_hook(lambda optimizer, *_: calls.append(("global pre", optimizer))),
        register_optimizer_step_post_hook(lambda optimizer, *_: calls.append(("global post", optimizer))),
    ]
    yield calls
    for handle in handles:
        handle.remove()


def test_step_hooks_run_in_torchs_order(global_hooks):
    """`test_step_all_hooks`: global before, own before, own after, global after, each once and about the wrapper."""
    optimizer = wrap(torch.optim.SGD([weight()], lr=0.1))
    optimizer.register_step_pre_hook(lambda opt, *_: global_hooks.append(("pre", opt)))
    optimizer.register_step_post_hook(lambda opt, *_: global_hooks.append(("post", opt)))
    order = [(name, optimizer) for name in ("global pre", "pre", "post", "global post")]
    for steps in (1, 2):
        optimizer.step()
        assert global_hooks == order * steps


def test_global_hooks_see_what_was_decided(global_hooks):
    """A step that tries several points is one step, and its weights are final after it."""
    parameter = weight()
    seen = []
    handle = register_optimizer_step_post_hook(lambda *_: seen.append(parameter.detach().clone()))
    optimizer = wrap(
        torch.optim.SGD([parameter], lr=1.0),
        kl=lambda: float((parameter.detach() - 1).abs().max()),
        budget=0.25,
        controller=Interpolate("bisect"),
    )
    optimizer.step()
    handle.remove()
    assert optimizer.last.action is Action.SHRINK
    assert len(optimizer.last.trials) > 1
    assert [name for name, _ in global_hooks] == ["global pre", "global post"]
    assert bits(seen) == bits([parameter.detach()])


def test_global_hooks_of_other_optimizers_and_their_removal(global_hooks):
    """A hook still fires for a bare optimizer, also within a loss closure, and for an inner one stepped by hand."""
    other, parameter = torch.optim.SGD([weight()], lr=0.1), weight()
    optimizer = wrap(torch.optim.SGD([parameter], lr=0.1))
    handle = register_optimizer_step_pre_hook(lambda *_: global_hooks.append(("removed", None)))
    optimizer.step(other.step)
    handle.remove()
    global_hooks.clear()
    optimizer.step(other.step)
    optimizer.optimizer.step()
    names = [(name, "inner" if opt is optimizer.optimizer else opt) for name, opt in global_hooks]
    assert names == [
        ("global pre", optimizer),
        ("global pre", other),
        ("global post", other),
        ("global post", optimizer),
        ("global pre", "inner"),
        ("global post", "inner"),
    ]


def test_equal_runs_have_equal_state_dicts():
    """`test_state_dict_deterministic`, and accelerate's `test_can_resume_training`: nothing in there is a time."""
    optimizers = []
    for _ in range(2):
        parameter = weight()
        optimizers.append(wrap(torch.optim.AdamW([parameter], lr=0.1)))
        for _ in range(3):
            optimizers[-1].step()
    first, second = optimizers
    assert first.summary()["inner_seconds"] != second.summary()["inner_seconds"]
    assert bits(first.state_dict()) == bits(second.state_dict())
    first.load_state_dict(deepcopy(second.state_dict()))
    assert first.summary()["steps"] == 3
    assert bits(first.state_dict()) == bits(second.state_dict())


def test_the_error_of_a_fused_step_on_meta_parameters_is_the_inner_optimizers():
    """`test_fused_error_on_params_on_meta`: tensors without bits are passed on."""
    with torch.device("meta"):
        model = nn.Linear(2, 3)
    optimizer = wrap(torch.optim.AdamW(model.parameters(), fused=True))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with pytest.raises(RuntimeError, match="`fused=True` requires all the params to be floating point Tensors"):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    with pytest.warns(UserWarning, match="none of the optimizer's 2 parameters has a gradient"):
        optimizer.step()
    assert optimizer.last.action is Action.UNCHANGED


def test_the_profiler_sees_one_step_of_the_inner_class():
    """`Optimizer.step#AdamW.step`, once a step: traces are read by that name."""
    optimizer = wrap(torch.optim.AdamW([weight()]))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
    names = [event.name for event in profile.events() if event.name.startswith("Optimizer.step")]
    assert names == ["Optimizer.step#AdamW.step"]


# -- Lightning ---------------------------------------------------------------------------------------------------------


def test_arguments_of_a_step_reach_the_inner_one_as_they_were_given():
    """`test_step_with_optimizer_closure_with_different_frequencies`: by keyword, by position, or not at all."""
    inner = torch.optim.SGD([weight()])
    optimizer = wrap(inner)
    with patch.object(inner, "step") as step:
        optimizer.step(closure=len, option="sgd")
        optimizer.step(len)
        optimizer.step()
        optimizer.step(closure=None)
    assert step.mock_calls == [call(closure=len, option="sgd"), call(len), call(), call(closure=None)]


def test_the_name_in_its_text_is_that_of_its_class():
    """`test_lightning_optimizer`: the proxy's text is that of the optimizer with another class name in front."""
    optimizer = wrap(torch.optim.SGD([weight()]))
    proxy = deepcopy(optimizer)
    proxy.__class__ = type("LightningSTEPOptimizer", (STEPOptimizer,), {})
    assert repr(optimizer).startswith("STEPOptimizer(SGD, ")
    assert repr(proxy) == "Lightning" + repr(optimizer)


# -- pytorch_optimizer -------------------------------------------------------------------------------------------------


@pytest.fixture
def mesh(tmp_path) -> Iterator[dist.DeviceMesh]:
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("budget", [math.inf, 0.5])
def test_sharded_parameters_are_moved_and_put_back(mesh, budget):
    """`test_sharded_updates`: of a DTensor, only the local part is bits."""
    start = torch.arange(12.0).reshape(4, 3)
    parameter = nn.Parameter(distribute_tensor(start.clone(), mesh, [Shard(0)]))
    optimizer = wrap(torch.optim.AdamW([parameter], lr=0.1), kl=lambda: 1.0, budget=budget, controller=Gate())
    twin = nn.Parameter(distribute_tensor(start.clone(), mesh, [Shard(0)]))
    bare = torch.optim.AdamW([twin], lr=0.1)
    for step in range(3):
        for p in (parameter, twin):
            p.grad = distribute_tensor(torch.full((4, 3), step + 1.0), mesh, [Shard(0)])
        optimizer.step()
        bare.step()
    assert isinstance(parameter.data, DTensor)
    assert bits(parameter.detach().to_local()) == bits(twin.detach().to_local() if budget == math.inf else start)
    assert bool(optimizer.state) is (budget == math.inf)


@pytest.mark.parametrize("way", ["step", "method", "loop"])
def test_a_step_in_compiled_code_is_the_step(way):
    """`test_create_compiled_optimizer`: `torch.compile` around a wrapped step runs it as python."""
    torch.compiler.reset()

    def run(compiled: bool):
        parameter = weight()
        optimizer = wrap(torch.optim.AdamW([parameter], lr=0.1))

        def loop():
            parameter.grad = 2 * parameter.detach()
            optimizer.step()

        if compiled and way == "step":
            optimizer.step = torch.compile(optimizer.step, backend="eager")
        if compiled and way == "method":
            optimizer.step = torch.compile(type(optimizer).step, backend="eager").__get__(optimizer)
        train = torch.compile(loop, backend="eager") if compiled and way == "loop" else loop
        for _ in range(3):
            train()
        assert optimizer.summary()["commits"] == 3
        return bits([parameter.detach(), list(optimizer.state.values())])

    try:
        assert run(compiled=True) == run(compiled=False)
    finally:
        torch.compiler.reset()


def test_public_attributes_of_the_inner_optimizer_are_written_where_they_are_read():
    """`test_magma_moment_selection` and `test_lomo_optimizer`: setting one has its effect."""

    class Scaled(torch.optim.SGD):
        scale = 1.0

        def __init__(self, params):
            super().__init__(params, lr=1.0)
            self.offset = 0.0

        @torch.no_grad()
        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                p.sub_(self.scale * p.grad + self.offset)

    parameter = weight()
    optimizer = wrap(Scaled([parameter]))
    optimizer.scale, optimizer.offset = 2.0, 0.5
    optimizer.step()
    assert parameter.tolist() == [-1.5] * 3
    assert (optimizer.scale, optimizer.offset) == (2.0, 0.5)
    del optimizer.scale
    assert optimizer.scale == 1.0
    optimizer.note_of_a_host, optimizer._offset = 1, 2
    assert "note_of_a_host" not in vars(optimizer.optimizer)
    assert "_offset" not in vars(optimizer.optimizer)
    with patch.object(optimizer, "scale", 3.0):
        assert optimizer.optimizer.scale == 3.0
    assert optimizer.optimizer.scale == 1.0


@pytest.mark.parametrize("name", ["FTRL", "MADGRAD", "DAdaptAdaGrad", "Nero"])
def test_an_optimizer_that_cannot_be_shrunk_may_be_measured(name):
    """`test_optimizers.py`: at an infinite budget nothing is shrunk; a finite one is refused."""
    pytorch_optimizer = pytest.importorskip("pytorch_optimizer")
    parameter, twin = weight(2, 3), weight(2, 3)
    optimizer = wrap(getattr(pytorch_optimizer, name)([parameter], lr=0.1))
    bare = getattr(pytorch_optimizer, name)([twin], lr=0.1)
    for _ in range(3):
        optimizer.step()
        bare.step()
    assert bits(parameter.detach()) == bits(twin.detach())
    with pytest.raises(ValueError, match="adaptive_rate"):
        optimizer.set_budget(1.0)
    assert optimizer.budget.mean == math.inf
    optimizer.controller = Gate()
    optimizer.set_budget(1.0)
    with pytest.raises(ValueError, match="adaptive_rate"):
        optimizer.controller = Interpolate()
