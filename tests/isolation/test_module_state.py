"""An audit leaves no trace in what modules hold besides weights, and reads nothing that forwards left there."""

from __future__ import annotations

import copy
import math
import random
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from step_optim import ControlSet, Interpolate, PolicyKL, STEPOptimizer, TokenKL
from step_optim.isolation.held import Held, Membership
from tests import reference
from tests.models import VOCAB, ragged_control, tiny_llama
from tests.strategies import bits


class Model(nn.Module):
    """A causal language model whose logits depend on the last token alone; subclasses leave things behind."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embedding, self.body, self.head = nn.Embedding(VOCAB, 16), nn.Linear(16, 16), nn.Linear(16, VOCAB)

    def hidden(self, ids: Tensor) -> Tensor:
        return torch.tanh(self.body(self.embedding(ids)))

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.hidden(input_ids))


class RunningMean(Model):
    """Statistics of every forward, in a plain tensor that is replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = torch.zeros(16)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.hidden(input_ids)
        logits = self.head(hidden - self.mean)
        self.mean = 0.9 * self.mean + 0.1 * hidden.detach().mean((0, 1))
        return logits


class RunningMeanInPlace(Model):
    """Statistics of training forwards, in a dict, written in place."""

    def __init__(self) -> None:
        super().__init__()
        self.statistics = {"mean": torch.zeros(16)}

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.hidden(input_ids)
        if self.training:
            self.statistics["mean"].mul_(0.9).add_(hidden.detach().mean((0, 1)), alpha=0.1)
        return self.head(hidden - self.statistics["mean"])


class GrowingTable(Model):
    """A table of positions that grows with the longest text, and a number beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.longest, self.table = 4, self._table(4)

    def _table(self, length: int) -> Tensor:
        return torch.linspace(0, 1, 64)[:length, None] * torch.linspace(-1, 1, 16)

    def forward(self, input_ids: Tensor) -> Tensor:
        length = input_ids.shape[1]
        if length > self.longest:
            self.table, self.longest = self._table(length), length
        return self.head(self.hidden(input_ids) + self.table[:length])


class GrowingBuffer(GrowingTable):
    """The table is a buffer."""

    def __init__(self) -> None:
        super().__init__()
        del self.table
        self.register_buffer("table", self._table(4), persistent=False)


class Rescaled(Model):
    """The frequencies of short texts depend on whether a long one came before: as with dynamic RoPE."""

    def __init__(self) -> None:
        super().__init__()
        self.longest = 12
        self.register_buffer("frequency", torch.ones(16), persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        length = input_ids.shape[1]
        if length > self.longest:
            self.frequency, self.longest = torch.full((16,), 12 / length), torch.tensor(length)
        elif length <= 12 < self.longest:
            self.frequency, self.longest = torch.ones(16), 12
        return self.head(self.hidden(input_ids) * self.frequency)


class EvalCache(Model):
    """Keeps what it computed from its weights, in eval mode."""

    cached: Tensor | None = None

    def forward(self, input_ids: Tensor) -> Tensor:
        if self.training:
            self.cached = None
        elif self.cached is None:
            self.cached = 2 * self.body.weight.detach()
        weight = 2 * self.body.weight if self.cached is None else self.cached
        return self.head(torch.tanh(self.embedding(input_ids) @ weight.T))


class Merging(Model):
    """Merges an adapter into its weight for eval forwards, and takes it out for training."""

    merged = False

    def forward(self, input_ids: Tensor) -> Tensor:
        if self.merged is self.training:
            self.body.weight.data += -0.1 if self.training else 0.1
            self.merged = not self.training
        return super().forward(input_ids)


class Normalised(Model):
    """Gives a child's weight other memory in every forward."""

    def forward(self, input_ids: Tensor) -> Tensor:
        self.head.weight.data = nn.functional.normalize(self.head.weight.data, dim=1)
        return super().forward(input_ids)


class Worn(Model):
    """Rescales a weight in place in every eval forward."""

    def forward(self, input_ids: Tensor) -> Tensor:
        if not self.training:
            self.body.weight.data.mul_(0.99)
        return super().forward(input_ids)


class Renormed(Model):
    """Rows of the embedding are cut to length as they are looked up."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding.max_norm = 1.0


class Spectral(Model):
    """The old spectral norm: a weight that is an attribute, at first a view of the parameter, and trained buffers."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.body = nn.utils.spectral_norm(self.body)


class History(Model):
    """A list that grows, and counts."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[float] = []

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.hidden(input_ids)
        self.calls.append(1.0)
        return self.head(hidden * (1 + 0.1 * len(self.calls)))


class Hooked(Model):
    """A forward hook keeps the latest activations in a module of torch's own."""

    def __init__(self) -> None:
        super().__init__()
        self.body.register_forward_hook(_keep)


def _keep(module: nn.Module, _inputs: object, out: Tensor) -> None:
    module.latest = out


class Batched(Model):
    """Batch statistics that training moves are part of the policy, whatever else the module keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(16)

    def forward(self, input_ids: Tensor) -> Tensor:
        self.latest = self.hidden(input_ids)
        return self.head(self.norm(self.latest.transpose(1, 2)).transpose(1, 2))


class ComputeType(Model):
    """Chooses what it computes in at the first forward, as quantized layers do."""

    chosen = False

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.hidden(input_ids)
        if not self.chosen:
            self.dtype, self.chosen = torch.float32 if not self.training else torch.bfloat16, True
        return self.head(hidden.to(self.dtype).float())


class Noisy(Model):
    """Draws from generators of its own, in eval mode too, and counts in an array."""

    def __init__(self) -> None:
        super().__init__()
        self.torch, self.python, self.numpy = (
            torch.Generator().manual_seed(3),
            random.Random(1),
            np.random.default_rng(2),
        )
        self.count = np.zeros(1)

    def forward(self, input_ids: Tensor) -> Tensor:
        self.count += 1
        noise = torch.rand(16, generator=self.torch) + self.python.random() + float(self.numpy.random())
        return self.head(self.hidden(input_ids) * (1 + 0.1 * noise + 0.01 * float(self.count[0])))


class Annotated(Model):
    """Keeps a number on a parameter from the first forward on."""

    def forward(self, input_ids: Tensor) -> Tensor:
        weight = self.body.weight
        if not hasattr(weight, "spread"):
            weight.spread = 1 + float(weight.detach().abs().mean())
        return self.head(self.hidden(input_ids) * weight.spread)


class MergingAdapter(Model):
    """Merges an adapter, which is 0 at first, into a frozen weight for eval forwards."""

    merged = False

    def __init__(self) -> None:
        super().__init__()
        self.body.requires_grad_(False)
        self.a = nn.Parameter(torch.linspace(-1, 1, 32).view(2, 16))
        self.b = nn.Parameter(torch.zeros(16, 2))

    def hidden(self, ids: Tensor) -> Tensor:
        embedded = self.embedding(ids)
        adapter = 0 if self.merged else embedded @ (self.b @ self.a).T
        return torch.tanh(self.body(embedded) + adapter)

    def forward(self, input_ids: Tensor) -> Tensor:
        if self.merged is self.training:
            self.body.weight.data += (-1 if self.training else 1) * (self.b @ self.a).detach()
            self.merged = not self.training
        return super().forward(input_ids)


LEAVES = [
    Model, RunningMean, RunningMeanInPlace, GrowingTable, GrowingBuffer, Rescaled, EvalCache, Merging, Normalised, Worn,
    Renormed, Spectral, History, Hooked, Batched, ComputeType, Noisy, Annotated, MergingAdapter,
]  # fmt: skip
EVERY = pytest.mark.parametrize("kind", LEAVES)


def held(model: nn.Module) -> dict[str, object]:
    """Everything that a trace could be left in."""
    return {
        "state": bits({name: tensor.detach() for name, tensor in model.state_dict().items()}),
        "buffers": bits(dict(model.named_buffers())),
        "places": [p.data_ptr() for p in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "attributes": [
            bits({"parameters": [vars(p) for p in m._parameters.values() if p is not None]})
            + bits({k: _state(v) for k, v in vars(m).items() if not k.startswith("_")} | {"keys": sorted(vars(m))})
            for m in model.modules()
        ],
    }


def _state(value: object) -> object:
    """What a generator will draw; anything else as it is."""
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, random.Random):
        return repr(value.getstate())
    return repr(value.bit_generator.state) if isinstance(value, np.random.Generator) else value


def batch(step: int) -> Tensor:
    """Training texts that become longer, beyond what the control set has."""
    return torch.randint(3, VOCAB, (3, 8 + 4 * step), generator=torch.Generator().manual_seed(step))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, around=lambda: None) -> list[float]:
    """Four steps; their losses. ``around`` is called before and after each."""
    losses = []
    model.train()
    for t in range(4):
        ids = batch(t)
        loss = nn.functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        around()
        optimizer.step()
        around()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@EVERY
def test_a_measured_run_is_the_bare_one(kind) -> None:
    """Losses, weights, buffers and attributes are bit for bit those of a run that nobody measured."""
    runs = []
    for wrapped in (False, True):
        model = kind()
        optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what a forward left behind is told once
            if wrapped:
                kl = TokenKL(model, ragged_control(), micro_batch=2)
                optimizer = STEPOptimizer(optimizer, kl=kl, budget=math.inf)
            runs.append((train(model, optimizer), {k: v for k, v in held(model).items() if k != "places"}))
    assert runs[0] == runs[1]


@pytest.mark.parametrize("kind", [kind for kind in LEAVES if kind is not ComputeType])  # the oracle computes in float64
def test_a_reading_is_of_the_weights_and_of_nothing_that_was_forwarded(kind) -> None:
    """The movement of every step is that of two fresh models with the weights (and buffers) before and after it."""
    control = ragged_control()
    model = kind()
    kl = TokenKL(model, control, micro_batch=2)
    optimizer = STEPOptimizer(torch.optim.SGD(model.parameters(), lr=0.5), kl=kl, budget=math.inf)
    states: list[dict[str, Tensor]] = []

    def compare() -> None:
        states.append(copy.deepcopy(model.state_dict()))
        if len(states) % 2 == 0:
            old, new = (_fresh(kind, state, control) for state in states[-2:])
            wanted = reference.movement(new, old, {}).mean
            assert optimizer.last.candidate.mean == reference.near(wanted, rel=1e-3)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(model, optimizer, compare)


def _fresh(kind: type[nn.Module], state: dict[str, Tensor], control: ControlSet) -> reference.Policy:
    """The policy of these weights in a model without a history: a new one for each prompt."""
    policy = []
    for i in range(len(control)):
        model = kind()
        model.load_state_dict(state)
        policy += reference.policy_of(model, control.select([i]))
    return policy


@EVERY
def test_construction_and_readings_leave_everything_as_it_was(kind) -> None:
    """Right after the model was made, and again after training forwards have left things in it."""
    model, control = kind().train(), ragged_control()
    kept = held(model)
    kl = TokenKL(model, control, prefix=True)
    kl.anchor()
    kl()
    assert held(model) == kept
    model(batch(2))
    kept = held(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kl.anchor()
        assert kl().mean == 0.0
    assert held(model) == kept


@EVERY
def test_a_function_leaves_no_trace_either(kind) -> None:
    """Modules that a plain function calls are found as they are called."""
    model = kind().train()
    ids = batch(1)
    weight = nn.Parameter(torch.zeros(1))
    optimizer = STEPOptimizer(
        torch.optim.SGD([weight], lr=1.0), kl=lambda: 0.0 * model(ids).square().mean().item(), budget=1.0
    )
    kept = held(model)
    weight.grad = torch.ones(1)
    optimizer.step()
    assert held(model) == kept


@EVERY
@pytest.mark.parametrize("named", [False, True])
def test_a_measured_run_of_a_policy_is_the_bare_one(kind, named) -> None:
    """The same for `PolicyKL`, whether it was told the model or finds it as it is called."""
    ids, runs = batch(1), []
    for wrapped in (False, True):
        model = kind()
        optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what a forward left behind is told once
            if wrapped:
                kl = PolicyKL(lambda m=model: m(ids)[:, -1], model=model if named else None)
                optimizer = STEPOptimizer(optimizer, kl=kl, budget=math.inf)
            runs.append((train(model, optimizer), {k: v for k, v in held(model).items() if k != "places"}))
    assert runs[0] == runs[1]


@pytest.mark.parametrize("kind", [EvalCache, History, RunningMean])
def test_a_policy_with_a_memory_reads_zero_at_rest(kind) -> None:
    """What a stateful policy keeps from call to call is put aside before each of them."""
    model, ids = kind(), batch(1)
    kl = PolicyKL(lambda: model(ids)[:, -1])
    kl.anchor()
    model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(ids)
        assert kl().mean == 0.0


def test_what_a_forward_left_behind_is_told_if_it_matters() -> None:
    """Once, with the attribute's name and the way out; what makes no difference is not told."""
    model, control = RunningMeanInPlace(), ragged_control()
    kl = TokenKL(model, control)
    kl.anchor()
    model.train()(batch(0))
    with pytest.warns(UserWarning, match=r"RunningMeanInPlace\.mean changed since TokenKL was made.*refresh\(\)"):
        kl()
    model(batch(1))
    assert kl().mean == 0.0
    silent = Hooked()
    other = TokenKL(silent, control)
    other.anchor()
    silent.train()(batch(0))
    assert other().mean == 0.0


def test_a_setting_of_the_user_counts() -> None:
    """A number that the user sets is read as it is; a tensor is, after refresh()."""

    class Scaled(Model):
        scale, gate = 1.0, torch.ones(())

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.head(self.hidden(input_ids) * self.scale * self.gate)

    model, control = Scaled(), ragged_control()
    old = reference.policy_of(model, control)
    kl = TokenKL(model, control)
    kl.anchor()
    model.scale = 2.0
    wanted = reference.movement(reference.policy_of(model, control), old, {}).mean
    assert kl().mean == pytest.approx(wanted, rel=1e-4)
    model.gate = torch.tensor(3.0)
    with pytest.warns(UserWarning, match=r"Scaled\.gate changed"):
        assert kl().mean == pytest.approx(wanted, rel=1e-4)
    kl.forget_attributes()
    wanted = reference.movement(reference.policy_of(model, control), old, {}).mean
    assert kl().mean == pytest.approx(wanted, rel=1e-4)


class Unfinished(Model):
    """Makes a layer in its first forward."""

    def forward(self, input_ids: Tensor) -> Tensor:
        if not hasattr(self, "late"):
            self.late = nn.Linear(16, 16)
        return self.head(self.late(self.hidden(input_ids)))


class LazyBody(Model):
    """Gets the shape of a weight in its first forward."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.LazyLinear(16)


class Archive(Model):
    """Writes into a large tensor that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.large = torch.zeros(2**17)

    def forward(self, input_ids: Tensor) -> Tensor:
        self.large.add_(1)
        return super().forward(input_ids)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Unfinished, r"Unfinished has made 'late' in its forward; run a forward before"),
        (LazyBody, r"the parameter 'body.weight' gets its shape in the first forward; run one before"),
        (Archive, r"Archive has written into 'large', a tensor \(131072,\) that is no buffer; register it as one"),
    ],
)
def test_what_cannot_be_put_back_is_refused_at_construction(kind, message) -> None:
    """With the module's name and the remedy."""
    with pytest.raises(ValueError, match=message):
        TokenKL(kind(), ragged_control())


@pytest.mark.parametrize("where", ["forward", "buffer", "reshaped"])
def test_a_failure_leaves_no_module_in_eval_mode(where) -> None:
    """In a forward, and while a buffer is put back that cannot take its old bits."""
    model, control = Batched().train(), ragged_control()
    kl = TokenKL(model, control)
    kl.anchor()

    def fail(*_: object) -> None:
        if where == "forward":
            raise ZeroDivisionError
        model.norm._buffers["running_mean"].resize_(3) if where == "reshaped" else None
        if where == "buffer":
            model.norm._buffers["running_mean"] = "no tensor"

    kept = bits(dict(model.named_buffers()))
    hook = model.head.register_forward_hook(fail)
    if where == "forward":
        with pytest.raises(ZeroDivisionError):
            kl()
    else:
        kl()
    hook.remove()
    assert all(module.training for module in model.modules())
    assert bits(dict(model.named_buffers())) == kept
    assert kl().mean == 0.0


def test_attributes_are_compared_by_identity_and_one_level_deep() -> None:
    """Members of containers and of objects count, those inside them do not."""
    model = Model()
    inner = object.__new__(type("Settings", (), {"__module__": "somewhere"}))
    inner.value = [1]
    model.plain, model.listed, model.mapped, model.settings = 1.5, [1, 2], {"a": 1}, inner
    first = Held(model, set(), set())
    membership = Membership(first.parts)
    assert first.same
    assert membership.same
    for change in (
        lambda: setattr(model, "plain", 2.5),
        lambda: model.listed.append(3),
        lambda: model.mapped.update(b=1),
        lambda: setattr(inner, "value", [1]),
        lambda: setattr(model, "new", None),
        lambda: delattr(model, "listed"),
    ):
        change()
        assert not first.same
        assert not membership.same
        first.put_back()
        assert first.same
        assert membership.same
    inner.value.append(2)
    assert first.same


def test_a_controller_that_acts_sees_the_same() -> None:
    """Trials of an interpolation begin from what the modules held at first, too, and budgets hold for fresh models."""
    control = ragged_control()
    for kind in (Rescaled, EvalCache, GrowingTable):
        model = kind()
        optimizer = STEPOptimizer(
            torch.optim.SGD(model.parameters(), lr=5.0),
            kl=TokenKL(model, control),
            budget=1e-3,
            controller=Interpolate(),
        )
        states: list[dict[str, Tensor]] = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            train(model, optimizer, lambda s=states, m=model: s.append(copy.deepcopy(m.state_dict())))
        assert optimizer.summary()["trigger_rate"] > 0
        policies = [_fresh(kind, state, control) for state in states]
        for old, new in zip(policies[::2], policies[1::2], strict=True):
            assert reference.movement(new, old, {}).mean <= 1e-3 * (1 + 1e-4)


def test_hooks_that_the_first_forward_hangs_in_are_hung_in_once() -> None:
    """Transformers collects hidden states with hooks and a flag that says they are there; both stay, or neither."""
    model = tiny_llama()
    model.config.output_hidden_states = True
    kl = TokenKL(model, ragged_control(), noise_floor=False)
    first = _hooks(model)
    kl.anchor()
    for _ in range(2):
        assert kl().mean == 0.0
        assert _hooks(model) == first
    with torch.no_grad():
        out = model(torch.tensor([[1, 2]]))
    assert _hooks(model) == first
    assert len(out.hidden_states) == 1 + model.config.num_hidden_layers


def _hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


class RunningMeanInBuffer(Model):
    """Statistics of every forward, in a buffer that is read before it is written."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(16))

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.hidden(input_ids)
        logits = self.head(hidden - self.mean)
        self.mean.mul_(0.9).add_(hidden.detach().mean((0, 1)), alpha=0.1)
        return logits


def test_a_buffer_that_audits_write_and_training_has_moved_is_told() -> None:
    """Audits begin with what it was at first, and say so, once; `refresh` takes it as it is."""
    model = RunningMeanInBuffer()
    kl = TokenKL(model, ragged_control())
    kl.anchor()
    model.train()(batch(0))
    with pytest.warns(UserWarning, match=r"RunningMeanInBuffer\.mean changed since TokenKL was made.*refresh\(\)"):
        assert kl().mean == 0.0
    model(batch(1))
    assert kl().mean == 0.0


def scripted(layer: nn.Module) -> type[Model]:
    """A model with TorchScript inside."""

    class Scripted(Model):
        def __init__(self) -> None:
            super().__init__()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch.jit.script is deprecated
                self.inside = torch.jit.script(nn.Sequential(copy.deepcopy(layer)))

        def hidden(self, ids: Tensor) -> Tensor:
            return self.inside(super().hidden(ids).transpose(1, 2)).transpose(1, 2)

    return Scripted


@pytest.mark.parametrize(
    "layer", [nn.Tanh(), nn.Conv1d(16, 16, 1), nn.BatchNorm1d(16)], ids=["none", "weights", "buffers"]
)
def test_torchscript_inside_a_model_is_read_and_left_alone(layer) -> None:
    """Its weights are measured and its buffers kept, by `TokenKL` and by `PolicyKL`."""
    model, ids = scripted(layer)().train(), batch(0)
    token, policy = TokenKL(model, ragged_control()), PolicyKL(lambda: model(ids)[:, -1])
    for kl in (token, policy):
        kl.anchor()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert token().mean == policy().mean == 0.0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules())
    old = _log_probabilities(model, ids)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.05)
    new = _log_probabilities(model, ids)
    true = float((new.exp() * (new - old)).sum(-1).mean())
    assert policy().mean == pytest.approx(true, rel=1e-3)
    assert token().mean > 0


def _log_probabilities(model: nn.Module, ids: Tensor) -> Tensor:
    """In eval mode, of the last tokens; the flags are put back."""
    model.eval()
    with torch.no_grad():
        logits = model(ids)[:, -1].double()
    model.train()
    return logits.log_softmax(-1)
