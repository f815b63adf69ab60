"""Compiled models and compiled steps: they train as they do bare, and audits compile nothing."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from step_optim import ControlSet, Interpolate, PolicyKL, STEPOptimizer, TokenKL
from tests.hosts.common import check_host, everything
from tests.hosts.loops import OBSERVATIONS, Net, adamw, train
from tests.models import tiny_llama
from tests.strategies import Bigram, bits

# -- torch.compile -------------------------------------------------------------------------------------------------


@pytest.fixture
def compiler():
    """Start and end without compiled code: graphs depend on what ran before."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled_as(way: str, model: nn.Module, backend: str) -> Callable[[Tensor], Tensor]:
    if way == "in place":
        model.compile(backend=backend)
        return model
    return torch.compile(model if way == "module" else model.forward, backend=backend)


compiled_ways = pytest.mark.parametrize("way", ["module", "in place", "function"])


@pytest.mark.usefixtures("compiler")
@compiled_ways
@pytest.mark.parametrize(("backend", "named"), [("eager", False), ("aot_eager", True)])
def test_a_compiled_model(way, backend, named):
    """The audit may go through compiled code, whether it is told the model or finds it."""

    def loop(wrap):
        torch._dynamo.reset()
        model = Net()
        compiled = compiled_as(way, model, backend)
        optimizer = wrap(adamw(model), lambda: compiled(OBSERVATIONS), model=model if named else None)
        losses = train(model, optimizer, range(3), forward=compiled)
        return everything(model, optimizer, losses=losses)

    check_host(loop)


@pytest.mark.usefixtures("compiler")
@compiled_ways
def test_the_audit_of_a_compiled_model_is_that_of_the_model_inside(way):
    """Dropout is off and BatchNorm in eval mode, and nothing is left behind, as without compilation."""
    torch.manual_seed(0)
    model = Net()
    compiled = compiled_as(way, model, "eager")
    train(model, adamw(model), range(2), forward=compiled)
    plain = Net()
    plain.load_state_dict(model.state_dict())
    kl, expected = PolicyKL(lambda: compiled(OBSERVATIONS)), PolicyKL(lambda: plain(OBSERVATIONS))
    kl.anchor()
    expected.anchor()
    assert kl().mean == 0
    before = bits(dict(model.named_buffers()))
    with torch.no_grad():
        model.head.bias[0] += 0.5
        plain.head.bias[0] += 0.5
    assert kl().mean == expected().mean > 0
    assert bits(dict(model.named_buffers())) == before
    assert all(module.training for module in model.modules())
    assert {id(module) for module in model.modules()} - {id(module) for module in kl.used} <= {id(model)}


@pytest.mark.usefixtures("compiler")
@compiled_ways
def test_audits_compile_nothing(way):
    """An audit that made guards of its own would push the user's training forward over the recompilation limit."""
    torch.manual_seed(0)
    model = Net()
    compiled = compiled_as(way, model, "eager")
    train(model, adamw(model), range(1), forward=compiled)
    optimizer = STEPOptimizer(
        adamw(model), kl=PolicyKL(lambda: compiled(OBSERVATIONS)), budget=1e-4, controller=Interpolate("bisect")
    )
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs > 0
    train(model, optimizer, range(3), forward=compiled)
    assert optimizer.last.audits > 3
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("way", ["module", "in place"])
@pytest.mark.parametrize("build", [Bigram, tiny_llama])
def test_token_kl_of_a_compiled_language_model(way, build):
    """TokenKL reads a compiled model as the plain one: the same figures, the same way to its logits."""
    torch.manual_seed(0)
    plain = build()
    model = copy.deepcopy(plain)
    compiled = compiled_as(way, model, "eager")
    control = ControlSet.from_ids([[3, 4], [5]], [[9, 10, 11], [12]], slices={"a": [0], "b": [1]})
    kl, expected = TokenKL(compiled, control), TokenKL(plain, control)
    kl.anchor()
    expected.anchor()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        with torch.no_grad():
            noise = 0.1 * torch.randn(a.shape, generator=torch.Generator().manual_seed(a.numel()))
            a.add_(noise)
            b.add_(noise)
    assert kl() == expected()
    assert kl().mean > 0
    assert kl.readout == expected.readout


@pytest.mark.usefixtures("compiler")
def test_a_compiled_inner_step():
    """The inner optimizer's step may be compiled; the transaction around it stays python."""

    def loop(wrap):
        torch._dynamo.reset()
        model = Net()
        inner = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, foreach=True)
        inner.step = torch.compile(inner.step, backend="eager")
        optimizer = wrap(inner, lambda: model(OBSERVATIONS))
        losses = train(model, optimizer, range(3))
        return everything(model, optimizer, losses=losses)

    check_host(loop)


def test_audits_do_not_make_warnings_repeat_themselves():
    """A warning that is shown once stays so: no audit makes python forget what it has shown."""
    model = Net()
    compiled = torch.compile(model, backend="eager")
    optimizer = STEPOptimizer(adamw(model), kl=PolicyKL(lambda: compiled(OBSERVATIONS)), budget=1.0)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        for step in range(3):
            warnings.warn("seen once", stacklevel=1)
            train(model, optimizer, range(step, step + 1))
    texts = [str(warning.message) for warning in seen]
    assert [text for text in texts if "hooks" in text or "once" in text] == ["seen once"]
