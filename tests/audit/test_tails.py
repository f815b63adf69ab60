"""Worst prompts, worst tokens and spans of positions: figures and gradients against the oracle, and what is refused."""

import copy
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from step_optim import Budget, ControlSet, Movement, PolicyKL, Steer, STEPOptimizer, TokenKL
from step_optim.audit.spans import checked_spans, find_spans
from tests import reference
from tests.audit.test_gradients import log_probs, policy, relative, trained_names
from tests.audit.test_token_kl import build
from tests.models import nudge, ragged_control, tiny_llama

SPANS = {"opening": (0, 2), "end": (-1, None), "rest": (2, None)}
MODELS = ("llama", "gpt2", "lora", "gemma2", "bigram")


def rows_of(new: reference.Policy, old: reference.Policy) -> list[list[float]]:
    """KL of every token of every prompt."""
    return [[reference.row_kl(c, p) for c, p in zip(*rows, strict=True)] for rows in zip(new, old, strict=True)]


def span_mean(rows: list[list[float]], span: tuple) -> float:
    """Mean over prompts that have a token there of the mean over these tokens."""
    parts = [each[slice(*span)] for each in rows]
    means = [sum(part) / len(part) for part in parts if part]
    return sum(means) / len(means)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", [1e-3, 0.4])
def test_figures_equal_the_oracle(name, size) -> None:
    """Of small and large movements, for every readout; drift has them, too."""
    model, control = build(name), ragged_control()
    kl = TokenKL(model, control, noise_floor=False, micro_batch=2, spans=SPANS)
    assert set(kl.slices) == {*control.slices, *SPANS}
    kl.anchor()
    old = reference.policy_of(model, control)
    nudge(model, size, seed=5)
    audit = kl.audit_with_drift()
    rows = rows_of(reference.policy_of(model, control), old)
    for moved in (audit.movement, kl.drift(audit)):
        for span, ends in SPANS.items():
            assert moved.slices[span] == reference.near(span_mean(rows, ends), 1e-3)
        assert moved.prompt == reference.near(max(sum(row) / len(row) for row in rows), 1e-3)
        assert moved.token == reference.near(max(map(max, rows)), 1e-3)


def test_a_single_token_is_read_as_exactly_as_all() -> None:
    """One token of one prompt moves, by next to nothing: its KL is right to 1e-3 of itself."""
    logits = torch.zeros(3, 4, 5, dtype=torch.float32)

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logits = nn.Parameter(logits.clone())

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.logits[input_ids[:, 0], : input_ids.shape[1]]

    table = Table()
    control = ControlSet.from_ids([[0], [1], [2]], [[1, 2, 3], [1, 2], [4]])
    kl = TokenKL(table, control, noise_floor=False, prefix=False)
    kl.anchor()
    old = reference.policy_of(table, control)
    with torch.no_grad():
        table.logits[1, 1, 3] += 1e-3
    moved = kl()
    wanted = reference.row_kl(reference.policy_of(table, control)[1][1], old[1][1])
    assert moved.token == pytest.approx(wanted, rel=1e-3)
    assert moved.prompt == pytest.approx(wanted / 2, rel=1e-3)
    assert moved.mean == pytest.approx(wanted / 6, rel=1e-3)


def tail_oracle(model: nn.Module, control: ControlSet, before: list[Tensor], name: str, chosen: list[int]):
    """The figure and its gradient, by autograd through a float64 copy."""
    twin = copy.deepcopy(model).double().eval()
    rows = {}
    for i in chosen:
        log_c = log_probs(twin, control.prompts[i], control.responses[i])
        rows[i] = (log_c.exp() * (log_c - before[i])).sum(-1)
    if name == "prompt":
        total = torch.stack([row.mean() for row in rows.values()]).max()
    elif name == "token":
        total = torch.cat(list(rows.values())).max()
    else:
        parts = [row[slice(*SPANS[name.partition(":")[2]])] for row in rows.values()]
        total = torch.stack([part.mean() for part in parts if len(part)]).mean()
    names = trained_names(model)
    named = dict(twin.named_parameters())
    found = torch.autograd.grad(total, [named[n] for n in names], allow_unused=True)
    zeros = [torch.zeros_like(named[n]) for n in names]
    return float(total.detach()), [z if g is None else g for g, z in zip(found, zeros, strict=True)]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("drawn", [False, True])
def test_gradients_equal_the_oracle(name, drawn) -> None:
    """On the control set, and on a draw from the pool."""
    model, control = build(name), ragged_control()
    pool = ControlSet.from_ids(
        [[1, 2], [5, 6, 7, 8], [9], [4, 4], [3, 1, 2]],
        [[20], [21, 22], [23, 24, 25], [26, 27], [28, 29, 30, 31]],
        {"early": [0, 1], "late": [2, 3]},
    )
    kl = TokenKL(model, control, noise_floor=False, micro_batch=2, pool=pool, spans=SPANS)
    kl.anchor()
    nudge(model, 0.4, seed=3)
    kl.anchor()
    names = ["prompt", "token", "slice:opening", "slice:end", "slice:rest"]
    draw = kl.draw(3, 1, names) if drawn else None
    measured, chosen = (pool, list(draw.prompts)) if draw else (control, list(range(len(control))))
    before = policy(model, measured)
    nudge(model, 0.4, seed=4)
    parameters = [dict(model.named_parameters())[n] for n in trained_names(model)]
    for constraint, normal in zip(names, kl.gradients(names, parameters, draw), strict=True):
        value, wanted = tail_oracle(model, measured, before, constraint, chosen)
        assert normal.value == pytest.approx(value, rel=1e-4)
        assert relative(normal.gradient, wanted) <= 1e-4


POLICIES = {
    "logits": (lambda z: z, None),
    "tokens of logits": (lambda z: torch.distributions.Categorical(logits=z.view(5, 2, 3)), "mean"),
    "Normal": (lambda z: torch.distributions.Normal(z[:, 0], z[:, 1].exp()), None),
    "tokens of a Normal": (lambda z: torch.distributions.Normal(z.view(5, 6), torch.ones(5, 6).double()), "mean"),
}


@pytest.mark.parametrize("name", POLICIES)
def test_observations_and_their_tokens(name) -> None:
    """Of a `PolicyKL`: the worst observation always, the worst token where observations have tokens."""
    make, reduction = POLICIES[name]
    torch.manual_seed(0)
    layer = nn.Linear(3, 6 if reduction else 3, dtype=torch.float64)
    inputs = torch.randn(5, 3, dtype=torch.float64)
    kl = PolicyKL(lambda: make(layer(inputs)), noise_floor=False, reduction=reduction)
    kl.anchor()
    before = make(layer(inputs).detach().clone())
    nudge(layer, 0.3)

    def tokens() -> Tensor:
        now = make(layer(inputs))
        if isinstance(now, Tensor):
            now, then = (torch.distributions.Categorical(logits=z) for z in (now, before))
        else:
            then = before
        return torch.distributions.kl_divergence(now, then).reshape(5, -1)

    moved, parameters = kl(), list(layer.parameters())
    figures = {"prompt": tokens().mean(1).max()} | ({"token": tokens().max()} if reduction else {})
    assert moved.prompt == pytest.approx(float(figures["prompt"].detach()), rel=1e-6)
    assert moved.token == (pytest.approx(float(figures["token"].detach()), rel=1e-6) if reduction else None)
    for (_, figure), normal in zip(figures.items(), kl.gradients(list(figures), parameters), strict=True):
        wanted = torch.autograd.grad(figure, parameters)
        assert normal.value == pytest.approx(float(figure.detach()), rel=1e-6)
        assert relative(normal.gradient, list(wanted)) <= 1e-4


def test_what_has_no_tokens_is_refused() -> None:
    layer = nn.Linear(3, 3)
    inner = torch.optim.SGD(layer.parameters(), lr=0.1)
    kl = PolicyKL(lambda: layer(torch.eye(3)))
    with pytest.raises(ValueError, match=r"budget.token=0.1 limits the worst token, and PolicyKL.*prompt="):
        STEPOptimizer(inner, kl=kl, budget=Budget(token=0.1))
    STEPOptimizer(inner, kl=kl, budget=Budget(prompt=0.1))
    optimizer = STEPOptimizer(inner, kl=lambda: 0.5, budget=Budget(prompt=0.1))
    before = layer.weight.detach().clone()
    layer.weight.grad, layer.bias.grad = torch.ones(3, 3), torch.ones(3)
    with pytest.raises(ValueError, match=r"budget.prompt=0.1 limits the worst prompt, which the KL closure does not"):
        optimizer.step()
    assert torch.equal(layer.weight, before)


def test_a_function_that_tells_every_prompt_has_tails_and_bounds() -> None:
    """``Movement.over`` as the function's result."""
    weight = nn.Parameter(torch.zeros(2))
    inner = torch.optim.SGD([weight], lr=1.0)

    def kl() -> Movement:
        return Movement.over([float(weight[0]) ** 2, 3 * float(weight[0]) ** 2], {})

    optimizer = STEPOptimizer(inner, kl=kl, budget=Budget(mean=1.0, prompt=0.75, confidence=0.9))
    weight.grad = torch.tensor([-1.0, 0.0])
    optimizer.step()
    last = optimizer.last
    assert last.candidate.prompt == 3.0
    assert last.accepted.prompt <= 0.75
    assert last.accepted_bounds["mean"] == last.accepted.upper(0.9) <= 1.0
    assert last.candidate_bounds["mean"] > 2.0


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    start=st.one_of(st.none(), st.integers(-6, 6)),
    stop=st.one_of(st.none(), st.integers(-6, 6)),
)
@settings(max_examples=200)
def test_spans_are_python_slices_of_responses(lengths, start, stop) -> None:
    """Rows, and the prompts that they are of; none at all is refused."""
    responses = [[100 * i + k for k in range(length)] for i, length in enumerate(lengths)]
    flat = [token for response in responses for token in response]
    wanted = [response[start:stop] for response in responses]
    if not any(wanted):
        with pytest.raises(ValueError, match="holds no token of the control set"):
            checked_spans({"x": (start, stop)}, [], lengths)
        return
    span = find_spans(checked_spans({"x": (start, stop)}, [], lengths), lengths)["x"]
    assert [flat[row] for row in span.rows.tolist()] == [token for part in wanted for token in part]
    assert span.prompts == tuple(i for i, part in enumerate(wanted) if part)
    assert [span.prompts[k] for k in span.place.tolist()] == [i for i, part in enumerate(wanted) for _ in part]


@pytest.mark.parametrize(
    ("spans", "error", "message"),
    [
        ({"early": (0, 1)}, ValueError, "spans names 'early', which is a slice already"),
        ({"mean": (0, 1)}, ValueError, "spans names 'mean'"),
        ({"x": (40, 50)}, ValueError, "holds no token of the control set, whose longest response has"),
        ({"x": (3, 2)}, ValueError, "stop behind start"),
        ({"x": 3}, TypeError, "is no \\(start, stop\\)"),
        ({"x": (0.5, 2)}, TypeError, "is no \\(start, stop\\)"),
        ({1: (0, 2)}, TypeError, "names of spans are texts"),
        ([(0, 2)], TypeError, "is no mapping"),
    ],
)
def test_bad_spans_are_refused_at_construction(spans, error, message) -> None:
    with pytest.raises(error, match=message):
        TokenKL(tiny_llama(), ragged_control(), noise_floor=False, spans=spans)


def test_confidence_needs_two_prompts_of_what_is_limited() -> None:
    """Refused at construction, with the slice's name; a slice that is not limited may have one."""
    model = tiny_llama()
    control = ControlSet.from_ids([[1, 2], [3], [5]], [[4, 5], [6], [7]], {"one": [0], "two": [1, 2]})
    kl = TokenKL(model, control, noise_floor=False)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(
        ValueError, match=r"budget.confidence=0.9 needs the spread over prompts, and slice 'one' has one"
    ):
        STEPOptimizer(inner, kl=kl, budget=Budget(slices=0.1, confidence=0.9))
    STEPOptimizer(inner, kl=kl, budget=Budget(mean=0.1, slices={"two": 0.1}, confidence=0.9))


def test_a_span_that_the_pool_lacks_is_refused_for_steer() -> None:
    """It would have no direction; a held-out set without it has no figure for it."""
    model, control = tiny_llama(), ragged_control()
    short = ControlSet.from_ids([[5], [8, 8]], [[1], [2]])
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    kl = TokenKL(model, control, noise_floor=False, pool=short, spans={"end": (2, None)})
    with pytest.raises(ValueError, match="the budget limits slice 'end', of which the pool has no prompts"):
        STEPOptimizer(inner, kl=kl, budget=Budget(slices={"end": 0.1}), controller=Steer())
    kl = TokenKL(model, control, noise_floor=False, held_out=short, spans={"end": (2, None), "first": (0, 1)})
    assert kl.held_out.slices == ("first",)
    named = ControlSet.from_ids([[5]], [[1]], {"end": [0]})
    with pytest.raises(ValueError, match="spans names 'end', which is a slice already"):
        TokenKL(model, control, noise_floor=False, held_out=named, spans={"end": (2, None)})


def test_a_span_that_one_process_lacks_has_no_gradient_there() -> None:
    """Its part of the control set has no token in it."""
    model = tiny_llama()
    kl = TokenKL(model, ControlSet.from_ids([[1], [2]], [[3, 4, 5], [6]]), noise_floor=False, spans={"end": (2, None)})
    kl.spans = find_spans({"end": slice(9, None)}, [3, 1])
    kl.anchor()
    (normal,) = kl.gradients(["slice:end"], list(model.parameters()))
    assert normal.value == 0
    assert all(not bool(part.any()) for part in normal.gradient)


@pytest.mark.parametrize("budget", [Budget(mean=0.1, confidence=0.9), Budget(prompt=0.1)])
def test_what_cannot_be_measured_is_no_failed_audit(budget) -> None:
    """It is raised where errors of audits are rejections, too: every step would be rejected without a word."""
    weight = nn.Parameter(torch.zeros(2))
    inner = torch.optim.SGD([weight], lr=0.1)
    optimizer = STEPOptimizer(inner, kl=lambda: float(weight[0]) ** 2, budget=budget, on_error="reject")
    weight.grad = torch.ones(2)
    with pytest.raises(ValueError, match=r"means only|limits the worst prompt"):
        optimizer.step()
    assert not weight.any()


def test_few_prompts_in_a_slice_are_told_of_once() -> None:
    model = tiny_llama()
    many = [[i] for i in range(1, 8)]
    control = ControlSet.from_ids(many, many, {"few": range(2), "enough": range(2, 7)})
    kl = TokenKL(model, control, noise_floor=False)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match=r"slices of few prompts \(slice 'few' has 2\), whose figures say little"):
        optimizer = STEPOptimizer(inner, kl=kl, budget=Budget(slices=0.1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.set_budget(Budget(slices=0.2))
        STEPOptimizer(inner, kl=kl, budget=Budget(slices={"enough": 0.2}))
