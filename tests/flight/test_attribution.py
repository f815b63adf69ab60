"""Which part of a step moved which slice: against brute force, on whatever became of the step."""

from __future__ import annotations

import json
import math
from typing import Any

import peft
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn

from step_optim import Action, Budget, ControlSet, Gate, Interpolate, STEPOptimizer, TokenKL
from step_optim.flight import Attribution, FlightRecorder, read_flight
from step_optim.flight.parts import module_of
from tests.flight.runs import recorded, train
from tests.models import ragged_control, tiny_llama
from tests.strategies import Bigram, policy_problem, wrap

# -- an exactly quadratic KL ------------------------------------------------------------------------------------------


class Quadratic:
    """K_s = ‖W_s (x - theta_t)‖² of float64 parameters, and a step to a given candidate; all known by hand.

    Args:
        sizes: of the parameters.
        seed: of the numbers.
    """

    def __init__(self, folder: Any, sizes: list[int], seed: int = 0, **options: Any) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.parameters = [nn.Parameter(torch.randn(n, generator=generator, dtype=torch.float64)) for n in sizes]
        self.before = [p.detach().clone() for p in self.parameters]
        self.deltas = [torch.randn(n, generator=generator, dtype=torch.float64) for n in sizes]
        total = sum(sizes)
        self.maps = {name: torch.randn(3, total, generator=generator, dtype=torch.float64) for name in ("a", "b")}
        self.differentiable = options.pop("differentiable", True)
        self.optimizer = STEPOptimizer(
            torch.optim.SGD([{"params": [p]} for p in self.parameters], lr=1.0),
            kl=self.kl,
            recorder=FlightRecorder(folder, when="always"),
            **({"budget": 1e-3, "controller": Gate()} | options),
        )
        for p, delta in zip(self.parameters, self.deltas, strict=True):
            p.grad = -delta
        self.optimizer.step()

    def kl(self) -> dict[str, Tensor]:
        """What the optimizer measures."""
        step = torch.cat([p - b for p, b in zip(self.parameters, self.before, strict=True)])
        found = {name: (map_ @ step).square().sum() for name, map_ in self.maps.items()}
        return found if self.differentiable else {name: kl.item() for name, kl in found.items()}

    def by_hand(self, without: set[int] = frozenset()) -> dict[str, float]:
        """K of the candidate with some parameters rolled back."""
        deltas = [torch.zeros_like(d) if i in without else d for i, d in enumerate(self.deltas)]
        found = {f"slice:{n}": float((map_ @ torch.cat(deltas)).square().sum()) for n, map_ in self.maps.items()}
        return {"mean": sum(found.values()) / 2, **found}

    def first_order(self, part: set[int]) -> dict[str, float]:
        """2 <W' W delta, delta of a part>."""
        own = torch.cat([d if i in part else torch.zeros_like(d) for i, d in enumerate(self.deltas)])
        whole = torch.cat(self.deltas)
        found = {f"slice:{n}": float(2 * (map_ @ whole) @ (map_ @ own)) for n, map_ in self.maps.items()}
        return {"mean": sum(found.values()) / 2, **found}


@given(sizes=st.lists(st.integers(1, 4), min_size=2, max_size=6), seed=st.integers(0, 10_000))
def test_of_a_quadratic_kl_all_figures_are_those_of_brute_force(tmp_path_factory, sizes, seed):
    """Effects, predictions and shares; predictions sum to 2 K, and each is the effect and the part's own K."""
    world = Quadratic(tmp_path_factory.mktemp("flight"), sizes, seed)
    found = world.optimizer.attribute()
    whole, total = world.by_hand(), sum(float(d.square().sum()) for d in world.deltas)
    assert len(found.parts) == len(sizes)
    for part in found.parts:
        i = int(part.name.removeprefix("group "))
        without, first = world.by_hand({i}), world.first_order({i})
        alone = world.by_hand(set(range(len(sizes))) - {i})
        assert part.share == pytest.approx(float(world.deltas[i].square().sum()) / total)
        assert part.effect.keys() == part.first_order.keys() == whole.keys()
        for name, kl in whole.items():
            close = {"rel": 1e-9, "abs": 1e-9 * (1 + kl)}
            assert part.effect[name] == pytest.approx(kl - without[name], **close)
            assert part.first_order[name] == pytest.approx(first[name], **close)
            assert part.first_order[name] == pytest.approx(part.effect[name] + alone[name], **close)
    for name, kl in whole.items():
        assert sum(part.first_order[name] for part in found.parts) == pytest.approx(2 * kl, rel=1e-9, abs=1e-9)
    left = [part.without.mean for part in found.parts]
    assert left == sorted(left)


@given(
    sizes=st.lists(st.integers(1, 3), min_size=4, max_size=9),
    audits=st.integers(2, 6),
    seed=st.integers(0, 10_000),
    differentiable=st.booleans(),
)
@example(sizes=[1, 2, 1, 1], audits=2, seed=0, differentiable=True)
def test_the_rest_is_measured_as_one(tmp_path_factory, sizes, audits, seed, differentiable):
    """The parts of the largest predictions, or of the largest updates, get an audit; the others one together."""
    world = Quadratic(tmp_path_factory.mktemp("flight"), sizes, seed, differentiable=differentiable)
    found, whole, count = world.optimizer.attribute(audits=audits), world.by_hand(), len(sizes)
    assert found.audits <= audits + 1
    assert found.gradients == (min(audits, 3) if differentiable else 0)
    assert [bool(part.first_order) for part in found.parts] == [differentiable] * len(found.parts)

    def worth(i: int) -> float:
        first = world.first_order({i})
        names = ["mean", "slice:a", "slice:b"] if audits > 2 else found.parts[0].first_order
        if differentiable:
            return sum(abs(first[name]) / whole[name] for name in names)
        return float(world.deltas[i].square().sum())

    own = sorted(range(count), key=worth, reverse=True)[: count if count <= audits else audits - 1]
    names = {f"group {i}" for i in own}
    rest = set(range(count)) - set(own)
    if rest:
        names.add(f"the rest ({len(rest)} parts)")
    assert {part.name for part in found.parts} == names
    for part in found.parts:
        places = rest if part.name.startswith("the rest") else {int(part.name.split()[1])}
        assert part.effect["slice:a"] == pytest.approx(whole["slice:a"] - world.by_hand(places)["slice:a"], abs=1e-9)
        assert part.tensors == len(places)


@pytest.mark.parametrize(
    ("budget", "constraint"),
    [(math.inf, "mean"), (Budget(mean=1e3, slices={"b": 1e-3}), "slice:b"), (Budget(slices={"a": 1e-3}), "slice:a")],
)
def test_the_table_is_about_what_bound(tmp_path, budget, constraint):
    """The part whose absence helps it most comes first."""
    world = Quadratic(tmp_path, [2, 3, 2, 1], budget=budget)
    found = world.optimizer.attribute()
    assert found.constraint == constraint
    left = [world.by_hand({int(part.name.split()[1])})[constraint] for part in found.parts]
    assert left == sorted(left)
    title, head, *rows = str(found).splitlines()
    assert title == f"step 0, {constraint}: the candidate reads {world.by_hand()[constraint]:.3g} nats per token"
    assert head.split("  ")[0] == "part"
    assert [row.split("  ")[0] for row in rows] == [part.name for part in found.parts]
    assert all(row.endswith(part.most) for row, part in zip(rows, found.parts, strict=True))


# -- kinds of parts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("by", "parts"),
    [
        ("group", {"group 0": 6}),
        ("layer", {"unnamed": 0}),
        ("module", {"body": 2, "norm": 2, "head": 2, "the model": 2}),
        ({"head.*": "top", "*.weight": "weights"}, {"top": 2, "weights": 2, "others": 4}),
        (lambda name: name[0], {"b": 2, "n": 2, "h": 2, "s": 1, "e": 1}),
    ],
)
def test_parts_of_a_policy(tmp_path, by, parts):
    """Groups, modules, name patterns, functions of the name."""
    problem, optimizer = recorded(tmp_path)
    train(problem, optimizer, 1)
    found = optimizer.attribute(by=by)
    if by == "group":
        assert {part.name: part.tensors for part in found.parts} == {"group 0": 8}
        (whole,) = found.parts
        assert whole.without.mean == 0
        assert whole.effect["mean"] == found.candidate.mean
    elif by == "layer":  # no name is numbered
        assert {part.name: part.tensors for part in found.parts} == {"layer 0": 8}
    else:
        assert {part.name: part.tensors for part in found.parts} == parts
        assert sum(part.share for part in found.parts) == pytest.approx(1)
    assert found.by == (by if isinstance(by, str) else "pattern" if isinstance(by, dict) else "function")


def test_modules_under_lora(tmp_path):
    """A and B of one adapter are one part, of the module that they adapt; layers are counted in the whole model."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        model = peft.get_peft_model(tiny_llama(layers=2), config)
    control = ragged_control()
    optimizer = STEPOptimizer(
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05),
        kl=TokenKL(model, control),
        budget=Budget(mean=1e-4, slices=1e-4),
        recorder=FlightRecorder(tmp_path, when="always"),
    )
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    found = optimizer.attribute(by="module")
    stem = "base_model.model.model.layers"
    names = {f"{stem}.{i}.self_attn.{module}" for i in (0, 1) for module in ("q_proj", "v_proj")}
    assert {part.name: part.tensors for part in found.parts} == dict.fromkeys(names, 2)
    assert found.constraint.removeprefix("slice:") in ("mean", "early", "late")
    assert all(part.first_order.keys() == {"mean", "slice:early", "slice:late"} for part in found.parts)
    assert found.audits == 5
    kept, by_hand = read_flight(tmp_path)[-1], {}
    for part in found.parts:  # measured by hand, with a closure of its own
        measured = TokenKL(model, control)
        load(model, kept, kept.previous)
        measured.anchor()
        back = {place for name, place in kept.names.items() if place is not None and module_of(name) == part.name}
        ends = zip(kept.previous, kept.candidate, strict=True)
        load(model, kept, [a if i in back else b for i, (a, b) in enumerate(ends)])
        by_hand[part.name] = measured()
    assert {part.name: part.without for part in found.parts} == by_hand
    layers = optimizer.attribute(kept, by="layer")
    assert {part.name: part.tensors for part in layers.parts} == {"layer 1": 4, "layer 2": 4}


def load(model: nn.Module, kept: Any, values: list[Tensor]) -> None:
    """Write a kept step's tensors into a model, by name."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if kept.names[name] is not None:
                parameter.copy_(values[kept.names[name]])


def test_a_tied_tensor_is_in_one_part(tmp_path):
    """It counts once, in the part of its first name."""
    torch.manual_seed(0)
    model = Bigram()
    model.lm_head.weight = nn.Parameter(torch.randn(13, 6))
    model.embed.weight = model.lm_head.weight
    optimizer = STEPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        kl=TokenKL(model, ControlSet.from_ids([[1, 2], [3]], [[4, 5], [6]])),
        budget=1e-4,
        recorder=tmp_path,
    )
    model(torch.tensor([[1, 2, 3]])).square().sum().backward()
    optimizer.step()
    found = optimizer.attribute(by="module")
    assert {part.name: part.tensors for part in found.parts} == {"embed": 1, "lm_head": 1}
    assert "most on" not in str(found)


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("base_model.model.layers.0.q_proj.lora_B.default.weight", "base_model.model.layers.0.q_proj"),
        ("embed.lora_embedding_A.default", "embed"),
        ("q_proj.lora_magnitude_vector.default.weight", "q_proj"),
        ("explora_net.weight", "explora_net"),
        ("bias", "the model"),
    ],
)
def test_the_module_of_a_parameter(name, module):
    """PEFT's matrices belong to the module that they adapt."""
    assert module_of(name) == module


# -- whatever became of the step --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("controller", "budget", "action"),
    [(Interpolate(), math.inf, Action.COMMIT), (Interpolate(), 1e-4, Action.SHRINK), (Gate(), 1e-4, Action.REJECT)],
)
def test_it_explains_the_candidate(tmp_path, controller, budget, action):
    """Of steps that stand, that were shortened, and that were rejected: all measure the same candidate."""
    problem, optimizer = recorded(tmp_path, controller=controller, budget=budget)
    train(problem, optimizer, 1)
    assert optimizer.last.action is action
    found = optimizer.attribute(by="module")
    assert found.candidate == optimizer.last.candidate
    reference_problem, reference = recorded(tmp_path / "twin", budget=math.inf)
    train(reference_problem, reference, 1)
    twin = {part.name: part.effect for part in reference.attribute(by="module").parts}
    assert {part.name: part.effect for part in found.parts} == twin


def test_drift_is_attributed_where_it_is_capped(tmp_path):
    """K from pi_ref, by slice too; without a cap there is none."""
    problem, optimizer = recorded(tmp_path, budget=Budget(mean=1.0, drift=1e-3), controller=Gate())
    train(problem, optimizer, 2)
    found = optimizer.attribute(by="module")
    assert found.constraint == "drift"
    assert found.candidate_drift == optimizer.last.candidate_drift
    for part in found.parts:
        names = {"mean", "slice:a", "slice:b", "slice:c", "drift", "drift:a", "drift:b", "drift:c"}
        assert part.effect.keys() == part.first_order.keys() == names
        assert part.effect["drift:b"] == found.candidate_drift.slices["b"] - part.without_drift.slices["b"]
    optimizer.set_budget(1e-3)
    train(problem, optimizer, [2])
    assert all(part.without_drift is None for part in optimizer.attribute(by="module").parts)


def test_the_worst_token_is_attributed_where_it_is_limited(tmp_path):
    """The tail that bound has a column of its own."""
    problem = policy_problem()
    problem.model.norm.momentum = 0.0
    optimizer = wrap(problem, Budget(mean=1.0, prompt=1e-5), recorder=tmp_path)
    train(problem, optimizer, 1)
    found = optimizer.attribute(by="module")
    assert found.constraint == "prompt"
    assert all({"mean", "prompt"} <= part.effect.keys() for part in found.parts)
    assert f"{found.candidate.prompt:.3g}" in str(found).splitlines()[0]


def test_a_part_that_is_not_finite_is_found(tmp_path):
    """Rolled back alone it leaves a policy that can be measured; it comes first."""
    problem, optimizer = recorded(tmp_path)
    problem.backward(0)
    problem.model.head.weight.grad[0, 0] = math.nan
    optimizer.step()
    found = optimizer.attribute(by="module")
    first, *others = found.parts
    assert first.name == "head"
    assert math.isfinite(first.without.mean)
    assert all(math.isnan(part.without.mean) for part in others)
    assert found.gradients == 0
    assert found.to_dict()["parts"][1]["without"]["mean"] == "NaN"
    assert str(found).splitlines()[2].startswith("head")
    assert {part.name for part in optimizer.attribute(by="module", audits=2).parts} == {"head", "the rest (3 parts)"}


def test_it_is_plain_json(tmp_path):
    """All that it holds, by the names of its fields."""
    found = Quadratic(tmp_path, [1, 2]).optimizer.attribute()
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert plain.keys() == set(Attribution.__dataclass_fields__)
    assert plain["parts"][0]["effect"] == found.parts[0].effect
    assert plain["candidate"]["slices"] == found.candidate.slices


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"by": "block"}, ValueError, "by='block' is unknown"),
        ({"by": {}}, ValueError, "by={} has no pattern"),
        ({"by": {"*": 1}}, TypeError, "must map name patterns"),
        ({"by": 3}, TypeError, "by=3 is none of"),
        ({"by": {"nothing": "x"}}, ValueError, "is left for the pattern 'nothing'"),
        ({"by": lambda name: None}, TypeError, "returned None"),
        ({"audits": 1}, ValueError, "audits=1 must be at least 2"),
        ({"audits": True}, TypeError, "audits=True"),
        ({"audits": 2.0}, TypeError, "audits=2.0"),
    ],
)
def test_bad_options_are_refused(tmp_path, options, error, message):
    """By name, and nothing has changed."""
    problem, optimizer = recorded(tmp_path)
    train(problem, optimizer, 1)
    with pytest.raises(error, match=message):
        train(problem, optimizer, [1], lambda *_: optimizer.attribute(**options))


def test_names_that_are_not_known_are_asked_for(tmp_path):
    """A function of bare tensors has groups alone."""
    optimizer = Quadratic(tmp_path, [1, 2]).optimizer
    with pytest.raises(ValueError, match="by='module' needs the names"):
        optimizer.attribute(by="module")
