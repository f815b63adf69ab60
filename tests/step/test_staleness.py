"""Edits from outside between two steps: the next one is measured from the edited policy, or the docs say what to do."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from step_optim import PolicyKL, STEPOptimizer, TokenKL
from step_optim.audit.fingerprint import SAMPLE
from tests import reference
from tests.models import VOCAB, ragged_control, tiny_llama, tiny_qwen


class Tower(nn.Module):
    """A causal model with frozen weights, a buffer, and a trained head. Returns logits [B, T, V]."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, width).requires_grad_(False)
        self.body = nn.Linear(width, width).requires_grad_(False)
        self.register_buffer("shift", torch.randn(width))
        self.head = nn.Linear(width, VOCAB)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.embed(input_ids)) + self.shift))


class Watched:
    """A model in training that says whether its reference was taken anew."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.control = model, ragged_control()
        self.kl = TokenKL(model, self.control)
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = STEPOptimizer(torch.optim.SGD(trained, lr=0.05), kl=self.kl, budget=1e3)
        self.anchored = 0
        anchor = self.kl.anchor

        def counted(audit=None) -> None:
            self.anchored += audit is None
            anchor(audit)

        self.kl.anchor = counted
        self.ids = torch.arange(24).view(4, 6) % VOCAB
        for _ in range(2):
            self.step()
        assert self.anchored == 1, "only the first step takes a reference"

    def policy(self) -> reference.Policy:
        return reference.policy_of(self.model, self.control)

    def step(self) -> float:
        """Make a step; return its movement from the policy right before it, by brute force."""
        self.optimizer.zero_grad()
        out = self.model(self.ids)
        logits = out if isinstance(out, Tensor) else out.logits
        logits.float().log_softmax(-1)[..., 0].mean().neg().backward()
        before = self.policy()
        self.optimizer.step()
        return reference.movement(self.policy(), before, {}).mean

    def edited(self, edit) -> None:
        """Edit, and check that the next step is measured from there, and the one after it costs no reference."""
        before, anchored = self.policy(), self.anchored
        edit()
        moved = reference.movement(self.policy(), before, {}).mean
        expected = self.step()
        assert self.anchored == anchored + 1, "the edit was not noticed"
        assert self.optimizer.last.candidate.mean == reference.near(expected, rel=2e-3)
        assert moved == 0 or abs(moved - expected) > 1e-3 * expected, "the edit says nothing"
        self.step()
        assert self.anchored == anchored + 1, "a reference was taken without need"


def tower(seed: int = 0) -> Tower:
    torch.manual_seed(seed)
    return Tower()


TENSORS = {
    "trained weight": lambda model: (model.head, "weight"),
    "trained bias": lambda model: (model.head, "bias"),
    "frozen weight": lambda model: (model.body, "weight"),
    "frozen embedding": lambda model: (model.embed, "weight"),
    "buffer": lambda model: (model, "shift"),
}


def in_place(module: nn.Module, name: str) -> None:
    with torch.no_grad():
        getattr(module, name).mul_(1.5)


def through_data(module: nn.Module, name: str) -> None:
    getattr(module, name).data.mul_(1.5)


def another_data(module: nn.Module, name: str) -> None:
    tensor = getattr(module, name)
    tensor.data = tensor.data * 1.5


def one_element(module: nn.Module, name: str) -> None:
    with torch.no_grad():
        getattr(module, name).view(-1)[1] += 1.5


def through_numpy(module: nn.Module, name: str) -> None:
    getattr(module, name).detach().numpy()[...] *= 1.5


def loaded(module: nn.Module, name: str) -> None:
    module.load_state_dict({**module.state_dict(), name: getattr(module, name).detach() * 1.5})


def replaced(module: nn.Module, name: str) -> None:
    old = getattr(module, name)
    new = old.detach() * 1.5
    setattr(module, name, nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new)


EDITS = (in_place, through_data, another_data, one_element, through_numpy, loaded, replaced)


@pytest.mark.parametrize(
    ("where", "edit"),
    # The optimizer would go on training a tensor that the model has no more.
    [(where, edit) for where in TENSORS for edit in EDITS if not (edit is replaced and where.startswith("trained"))],
)
def test_an_edited_tensor_is_noticed(where, edit) -> None:
    """Trained and frozen weights and buffers, however they are written."""
    model = tower()
    watched = Watched(model)
    module, name = TENSORS[where](model)
    watched.edited(lambda: edit(module, name))


@pytest.mark.parametrize("name", ["head", "body", "embed"])
def test_one_element_of_a_trained_tensor_through_data_is_noticed(name) -> None:
    """All bits of trained tensors are compared; of a frozen one, those of a sample."""
    model = tower()
    watched = Watched(model)
    tensor = getattr(model, name).weight
    place = -1 if name == "head" else tensor.numel() // SAMPLE  # an element of the sample
    watched.edited(lambda: tensor.data.view(-1)[place : None if place < 0 else place + 1].add_(1.5))


WHOLE = {
    "load_state_dict": lambda model: model.load_state_dict(tower(1).state_dict()),
    "load_state_dict, assigned": lambda model: _assigned_frozen(model),
    "half and back": lambda model: model.half().float(),
    "to double": lambda model: model.to(torch.float64),
    "apply": lambda model: model.apply(lambda m: m.weight.data.mul_(1.1) if isinstance(m, nn.Linear) else None),
    "body swapped": lambda model: setattr(model, "body", nn.Linear(16, 16).requires_grad_(False)),
    "body swapped for none": lambda model: setattr(model, "body", nn.Identity()),
    "weights swapped": lambda model: _swapped(model),
    "frozen": lambda model: model.head.bias.requires_grad_(False),
}


def _assigned_frozen(model: Tower) -> None:
    model.body.load_state_dict(tower(1).body.state_dict(), assign=True)
    model.body.requires_grad_(False)


def _swapped(model: Tower) -> None:
    other = tower(1)
    torch.utils.swap_tensors(model.body.weight, other.body.weight)


@pytest.mark.parametrize("edit", WHOLE)
def test_an_edit_of_a_whole_model_is_noticed(edit) -> None:
    """Checkpoints, dtypes, modules."""
    model = tower()
    watched = Watched(model)
    watched.edited(lambda: WHOLE[edit](model))


def test_tied_weights_are_noticed_through_either_name() -> None:
    """An embedding that is the head as well."""
    model = tiny_qwen()
    model.requires_grad_(False)
    model.model.layers[0].requires_grad_(True)
    watched = Watched(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    watched.edited(lambda: model.lm_head.weight.data.mul_(1.2))
    watched.edited(lambda: model.model.embed_tokens.weight.data.mul_(1.2))
    watched.edited(lambda: setattr(model.lm_head, "weight", nn.Parameter(model.lm_head.weight * 1.2, False)))  # untied


@pytest.fixture
def adapted() -> Watched:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    return Watched(peft.get_peft_model(tiny_llama(), config))


def test_a_merged_adapter_is_noticed(adapted) -> None:
    """merge_adapter() writes the base weights, unmerge_adapter() writes them back."""
    anchored = adapted.anchored
    adapted.model.merge_adapter()
    adapted.model.unmerge_adapter()
    expected = adapted.step()
    assert adapted.optimizer.last.candidate.mean == reference.near(expected, rel=2e-3)
    assert adapted.anchored == anchored + 1


def test_a_disabled_adapter_is_noticed(adapted) -> None:
    """A step in disable_adapter() is measured from the base model, and the next one from the adapted one again."""
    model = adapted.model
    extra = model.base_model.model.lm_head.weight.requires_grad_(True)
    adapted.optimizer.add_param_group({"params": [extra]})
    with model.disable_adapter():
        assert adapted.step() == reference.near(adapted.optimizer.last.candidate.mean, rel=2e-3)
    anchored = adapted.anchored
    assert adapted.step() == reference.near(adapted.optimizer.last.candidate.mean, rel=2e-3)
    assert adapted.anchored == anchored + 1


def test_an_evaluation_without_the_adapter_costs_no_reference(adapted) -> None:
    """disable_adapter() between two steps, for the reference policy of GRPO say, is no edit."""
    anchored = adapted.anchored
    with torch.no_grad(), adapted.model.disable_adapter():
        adapted.model(adapted.ids)
    adapted.step()
    assert adapted.anchored == anchored


def unseen(weight: Tensor) -> None:
    """Edit most of a frozen tensor through `.data`, but for the elements that are read."""
    flat, spread = weight.data.view(-1), weight.numel() // SAMPLE
    assert spread > 1
    kept = flat[::spread].clone()
    flat.mul_(6.0)
    flat[::spread] = kept


def test_the_one_edit_that_needs_refresh() -> None:
    """A part of a frozen tensor through `.data` is not seen, if it misses the elements that are read."""
    model = tower()
    watched = Watched(model)
    unseen(model.embed.weight)
    expected = watched.step()
    assert watched.anchored == 1
    assert watched.optimizer.last.candidate.mean > 2 * expected  # the edit counts as movement
    unseen(model.embed.weight)
    watched.optimizer.refresh()
    expected = watched.step()
    assert watched.optimizer.last.candidate.mean == reference.near(expected, rel=2e-3)
    assert "part of a frozen" in STEPOptimizer.refresh.__doc__
    assert "`.data`" in STEPOptimizer.refresh.__doc__


def test_a_plain_attribute_needs_refresh(adapted) -> None:
    """The scaling of an adapter is a number in a dictionary: nothing of the model's tensors tells of it."""
    layer = next(m for m in adapted.model.modules() if isinstance(getattr(m, "scaling", None), dict))
    layer.scaling["default"] *= 10
    expected = adapted.step()
    assert adapted.anchored == 1
    assert adapted.optimizer.last.candidate.mean > 2 * expected
    layer.scaling["default"] /= 10
    adapted.optimizer.refresh()
    expected = adapted.step()
    assert adapted.optimizer.last.candidate.mean == reference.near(expected, rel=2e-3)
    assert "plain\n        attribute of a module" in STEPOptimizer.refresh.__doc__


def test_an_edit_that_is_undone_before_the_step_costs_at_most_a_reference() -> None:
    """Averaged weights that are swapped in for an evaluation and out again leave the step's movement as it was."""
    model = tower()
    watched = Watched(model)
    saved = copy.deepcopy(model.state_dict())
    model.load_state_dict(tower(1).state_dict())
    model.load_state_dict(saved)
    expected = watched.step()
    assert watched.optimizer.last.candidate.mean == reference.near(expected, rel=2e-3)


def test_a_module_that_a_function_calls_is_watched() -> None:
    """A PolicyKL over an opaque function knows the modules that it called, swapped ones included."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    model[0].requires_grad_(False)
    seen = torch.randn(5, 4)
    kl = PolicyKL(lambda: model(seen))
    optimizer = STEPOptimizer(torch.optim.SGD(model[2].parameters(), lr=0.05), kl=kl, budget=1e3)

    def step() -> float:
        optimizer.zero_grad()
        model(seen).log_softmax(-1)[:, 0].mean().neg().backward()
        before = model(seen).detach().double()
        optimizer.step()
        after = model(seen).detach().double()
        p, q = after.log_softmax(-1), before.log_softmax(-1)
        return float((p.exp() * (p - q)).sum(-1).mean())

    for edit in (
        lambda: None,
        lambda: model[0].weight.data.mul_(2.0),
        lambda: model.__setitem__(0, nn.Linear(4, 8).requires_grad_(False)),
        lambda: model.__setitem__(1, nn.ReLU()),
        lambda: model.insert(1, nn.Softsign()),
    ):
        step()
        edit()
        expected = step()
        assert optimizer.last.candidate.mean == reference.near(expected, rel=1e-3)


def frozen_and_trained() -> tuple[nn.Sequential, STEPOptimizer, Callable[[], None]]:
    """A frozen layer below a trained one, and what makes a step."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 4)), torch.randn(8, 300)
    model[0].requires_grad_(False)
    optimizer = STEPOptimizer(torch.optim.SGD(model[1].parameters(), lr=0.1), kl=PolicyKL(lambda: model(x)), budget=1.0)

    def step() -> None:
        optimizer.zero_grad()
        model(x).logsumexp(-1).mean().backward()
        optimizer.step()

    return model, optimizer, step


def test_no_memory_of_frozen_weights_is_kept_between_steps() -> None:
    """A frozen base that is offloaded or replaced is freed at once; nor is there a copy of it from construction on."""
    model, _, step = frozen_and_trained()
    step()
    old = model[0].weight.untyped_storage()
    count = torch._C._storage_Use_Count
    alone = count(old._cdata)
    model[0].weight.data = model[0].weight.data.clone()
    assert count(old._cdata) == alone - 1
    for _ in range(3):
        model[0].load_state_dict({k: v.clone() for k, v in model[0].state_dict().items()}, assign=True)
        model[0].requires_grad_(False)
        step()
    gc.collect()
    alive = [o for o in gc.get_objects() if type(o) in (Tensor, nn.Parameter) and o.shape == (300, 300)]
    assert len(alive) == 1


@pytest.mark.parametrize("edit", ["data", "values", "none"])
def test_a_sparse_buffer_is_read_anew(edit) -> None:
    """A swap of its `.data` and a write into its values are edits; an untouched one is no edit."""

    def graph(weight: float) -> Tensor:
        return torch.sparse_coo_tensor([[0, 1, 2], [1, 2, 0]], [weight] * 3, (3, 3), check_invariants=True).coalesce()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)
            self.register_buffer("graph", graph(1.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(torch.sparse.mm(self.graph, x))

    torch.manual_seed(0)
    net, x = Net(), torch.randn(3, 4)
    optimizer = STEPOptimizer(torch.optim.SGD(net.parameters(), lr=1e-4), kl=PolicyKL(lambda: net(x)), budget=1e9)

    def step() -> None:
        optimizer.zero_grad()
        net(x).logsumexp(-1).mean().backward()
        optimizer.step()

    step()
    step()
    if edit == "data":
        net.graph.data = graph(20.0)
    elif edit == "values":
        net.graph._values().mul_(20.0)
    step()
    assert optimizer.last.candidate.mean < 1e-3
