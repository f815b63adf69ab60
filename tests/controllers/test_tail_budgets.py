"""Every controller holds budgets for tails, spans, and with confidence; the oracle measures what was committed."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from step_optim import Action, Budget, ControlSet, Gate, Interpolate, Project, Steer, STEPOptimizer, TokenKL
from step_optim.limits import Limits
from step_optim.movement import Movement
from tests import reference
from tests.models import tiny_llama
from tests.strategies import Bigram

SPANS = {"opening": (0, 2), "end": (-1, None)}
SLICES = {"a": [0, 1, 2], "b": [2, 3, 4]}
CONTROLLERS = {
    "gate": Gate(),
    "model": Interpolate(),
    "bisect": Interpolate(search="bisect"),
    "backtrack": Interpolate(search="backtrack"),
    "project": Project(),
    "steer": Steer(),
}
PARTS = ("mean", "slices", "prompt", "token", "drift", "drift_slices")


def tokens(start: int, count: int) -> list[int]:
    return [(start + 3 * k) % 13 for k in range(count)]


CONTROL = ControlSet.from_ids([tokens(i, 2) for i in range(5)], [tokens(i + 4, 2 + i) for i in range(5)], SLICES)
POOL = ControlSet.from_ids([tokens(i, 3) for i in range(6)], [tokens(i + 1, 4) for i in range(6)], SLICES)


def movement(new: reference.Policy, old: reference.Policy) -> Movement:
    """By the oracle."""
    rows = [[reference.row_kl(c, p) for c, p in zip(*pair, strict=True)] for pair in zip(new, old, strict=True)]
    spans = {}
    for name, ends in SPANS.items():
        parts = [row[slice(*ends)] for row in rows]
        spans[name] = [sum(part) / len(part) for part in parts if part]
    return Movement.over([sum(row) / len(row) for row in rows], SLICES, token=max(map(max, rows)), spans=spans)


def run(controller, budget: Budget, seed: int, lr: float, steps: int = 4):
    """Steps of a small language model; yields the record and the oracle's movement and drift."""
    torch.manual_seed(seed)
    model = Bigram()
    kl = TokenKL(model, CONTROL, noise_floor=False, spans=SPANS, pool=POOL)
    optimizer = STEPOptimizer(torch.optim.SGD(model.parameters(), lr=lr), kl=kl, budget=budget, controller=controller)
    origin = reference.policy_of(model, CONTROL)
    for _ in range(steps):
        old, ids = reference.policy_of(model, CONTROL), torch.randint(13, (4, 6))
        logits = model(ids)
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        new = reference.policy_of(model, CONTROL)
        yield optimizer.last, movement(new, old), movement(new, origin)


@pytest.mark.parametrize("name", CONTROLLERS)
@settings(max_examples=25, deadline=None)
@given(
    part=st.sampled_from(PARTS),
    also=st.sampled_from(PARTS),
    size=st.floats(-4, -1).map(lambda x: 10**x),
    confidence=st.sampled_from([None, 0.8, 0.95]),
    seed=st.integers(0, 50),
    lr=st.sampled_from([0.3, 3.0]),
)
def test_budgets_hold(name, part, also, size, confidence, seed, lr) -> None:
    """What was committed is within them, as the oracle reads it in float64; spans are slices like others."""
    if {part, also} <= {"prompt", "token"}:
        confidence = None  # it is about means
    budget = Budget(**{part: size, also: size}, confidence=confidence)
    limits: Limits = budget.at(0, [*SLICES, *SPANS])
    for record, moved, drift in run(CONTROLLERS[name], budget, seed, lr):
        if record.action is Action.REJECT:
            continue
        ratios = limits.judge(moved, drift).ratios
        if record.exceeded_before:
            ratios = {name: ratio for name, ratio in ratios.items() if not name.startswith("drift")}
        assert max(ratios.values()) <= 1 + 1e-3 + reference.rounding(size) / size
        assert record.accepted.token == reference.near(moved.token, 1e-3)
        if confidence is not None and record.triggered:
            assert record.accepted_bounds == pytest.approx(limits.bounds(moved, drift), rel=2e-3, abs=1e-8)


@pytest.mark.parametrize("name", [name for name in CONTROLLERS if name != "gate"])
@pytest.mark.parametrize(
    "budget", [Budget(prompt=0.01), Budget(token=0.02), Budget(slices={"opening": 0.01}, confidence=0.9)]
)
def test_what_shrinks_uses_most_of_the_budget(name, budget) -> None:
    """A budget on one step is feasible at theta_t: nothing is rejected, and steps end near the bound."""
    used = []
    for record, _, _ in run(CONTROLLERS[name], budget, seed=1, lr=3.0):
        assert record.action is not Action.REJECT
        if record.triggered:
            used.append(max(record.budget.judge(record.accepted).ratios.values()))
    assert used
    assert min(used) >= 0.4
    assert max(used) <= 1


def test_projection_weakens_the_worst_prompt_alone() -> None:
    """Where one prompt moves far and others little, the mixture keeps the others' whole movement."""
    from step_optim import PolicyKL
    from step_optim.controllers.mixture import mixture_strength

    previous = torch.zeros(4, 5)
    table = torch.nn.Parameter(previous.clone())
    kl = PolicyKL(lambda: table, noise_floor=False)
    kl.anchor()
    with torch.no_grad():
        table[0, 0], table[1, 0] = 3.0, 0.1
    strength = mixture_strength(kl, kl.audit(), Limits(prompt=0.05))
    assert strength[1:].tolist() == [1.0, 1.0, 1.0]
    assert 0 < strength[0] < 1
    moved = kl.prompt_kl(kl.audit(), strength)
    assert float(moved[0]) == pytest.approx(0.05, rel=0.03)


def test_projection_reads_tokens_and_spans_of_mixtures() -> None:
    """`prompt_kl` and `prompt_drift` at lambda 1 are the candidate's own figures."""
    torch.manual_seed(0)
    model = tiny_llama()
    control = ControlSet.from_ids([[1, 2], [3, 4, 5]], [[6, 7, 8], [9, 10]])
    kl = TokenKL(model, control, noise_floor=False, spans={"opening": (0, 2), "third": (2, 3)})
    kl.anchor()
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p)
    audit = kl.audit()
    ones, both = torch.ones(2), torch.arange(2)
    for measure in (kl.prompt_kl, kl.prompt_drift):
        assert float(measure(audit, ones, both, "token").max()) == pytest.approx(audit.movement.token, rel=1e-4)
        assert float(measure(audit, ones, both, "opening").mean()) == pytest.approx(
            audit.movement.slices["opening"], rel=1e-4
        )
        third = measure(audit, torch.ones(1), torch.tensor([0]), "third")
        assert float(third) == pytest.approx(audit.movement.slices["third"], rel=1e-4)
    model.load_state_dict(before)
    assert math.isclose(kl().mean, 0.0, abs_tol=1e-12)
