"""What an audit can tell from rounding: the noise floor, the audit's dtype, and forwards that are not deterministic."""

from __future__ import annotations

import copy
import json
import math
import warnings

import peft
import pytest
import torch
from torch import Tensor, nn

from step_optim import Budget, ControlSet, Gate, PolicyKL, Project, STEPOptimizer, TokenKL
from step_optim.audit import noise
from step_optim.audit.noise import AWAY, SIZES, moved_away, moved_by, trained_weights
from step_optim.movement import Movement
from tests import reference
from tests.audit.test_token_kl import BiasedHead, build, close, expected
from tests.models import Bigram, nudge, ragged_control, tiny_gpt2, tiny_llama

BF16 = torch.bfloat16


def trained(model: nn.Module, **options) -> STEPOptimizer:
    """An optimizer around it."""
    return STEPOptimizer(torch.optim.SGD(model.parameters(), lr=1e-3), **options)


def test_the_floor_of_float32_is_far_below_any_budget_and_that_of_bfloat16_is_not() -> None:
    """A movement that is known to be next to nothing reads next to nothing in float32, and noise in bf16."""
    wide = TokenKL(tiny_llama(hidden=64, layers=3), ragged_control()).noise_floor
    narrow = TokenKL(tiny_llama(hidden=64, layers=3, dtype=BF16), ragged_control()).noise_floor
    assert wide.dtype == torch.float32
    assert wide.measured.mean < 1e-9
    assert wide.expected < 1e-11
    assert narrow.dtype == BF16
    assert narrow.measured.mean > 1e-6
    assert narrow.measured.mean > narrow.expected
    assert set(narrow.measured.slices) == {"early", "late"}


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_the_known_movement_is_known(dtype) -> None:
    """What the movement of the floor is said to be is what a float64 evaluation of the same weights says."""
    control, model = ragged_control(), tiny_llama(hidden=64, dtype=dtype)
    floor = TokenKL(model, control).noise_floor
    start = moved_away(trained_weights(model.parameters()))

    def oracle(size: float) -> float:
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(start[id(p)])
            previous = reference.policy_of(model, control)
            for p in model.parameters():
                p.copy_(moved_by(start[id(p)], size))
        return expected(model, previous, control).mean

    moved = {size: oracle(size) for size in SIZES}
    assert any(kl / 3 < floor.expected < 3 * kl for kl in moved.values()), (floor, moved)


def adapted(dtype: torch.dtype, hidden: int = 64) -> nn.Module:
    """A frozen model that computes in one dtype, with float32 adapters that begin at 0."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])
        model = peft.get_peft_model(tiny_llama(hidden=hidden, layers=2, dtype=dtype), config)
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.float()
    return model


def test_what_is_trained_is_moved_through_every_cast_on_the_way() -> None:
    """Float32 adapters in a bf16 body: their own unit in the last place is rounded away, and yet there is noise."""
    control = ragged_control()
    wide, narrow = (TokenKL(adapted(dtype), control).noise_floor for dtype in (torch.float32, BF16))
    assert wide.measured.mean < 1e-8
    assert narrow.measured.mean > 1e-5
    assert narrow.measured.mean > 10 * narrow.expected
    # What a tiny movement of the adapters reads is of the floor's size at most.
    model = adapted(BF16)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    kl = TokenKL(model, control)
    kl.anchor()
    readings = []
    for seed in range(8):
        before = copy.deepcopy(model.state_dict())
        nudge(model, 1e-4, seed=seed)
        readings.append(kl().mean)
        model.load_state_dict(before)
    assert 0 < max(readings) < 30 * kl.noise_floor.measured.mean


class Sees(nn.Module):
    """A language model beside a tower for images, which text does not reach."""

    def __init__(self, freeze: str) -> None:
        super().__init__()
        self.vision, self.language = nn.Linear(4, 4), Bigram()
        getattr(self, freeze).requires_grad_(False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits of the text alone."""
        return self.language(input_ids)


def test_weights_that_the_control_set_does_not_reach() -> None:
    """The floor is that of the weights that do; where no trained weight does, that is said."""
    assert TokenKL(Sees("vision"), ragged_control()).noise_floor.measured.mean < 1e-9
    with pytest.warns(UserWarning, match=r"no movement of the 2 weights that are trained changes what Sees says"):
        assert TokenKL(Sees("language"), ragged_control()).noise_floor is None


def test_the_audit_dtype_is_what_the_body_runs_in() -> None:
    """A bf16 model audited in float32 equals the oracle at 1e-5 nats, where bf16 reads noise; the weights stay bf16."""
    control, model = ragged_control(), tiny_llama(hidden=64, layers=3, dtype=BF16)
    parameters = {name: (p, p.data_ptr()) for name, p in model.named_parameters()}
    previous = reference.policy_of(model, control)
    wide, narrow = TokenKL(model, control, audit_dtype=torch.float32), TokenKL(model, control)
    wide.anchor()
    narrow.anchor()
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[::7, ::5] *= 1 + 2**-7
    wanted = expected(model, previous, control)
    close(wide(), wanted, rel=1e-2)
    assert wide.noise_floor.measured.mean < 1e-2 * narrow.noise_floor.measured.mean
    assert abs(narrow().mean / wanted.mean - 1) > abs(wide().mean / wanted.mean - 1)
    for name, p in model.named_parameters():
        assert p is parameters[name][0]
        assert p.data_ptr() == parameters[name][1]
        assert p.dtype == BF16


def test_an_audit_in_bfloat16_of_a_float32_model() -> None:
    """The other way round: a faster body, a higher floor, exactly 0 unmoved, and the model's head stays tied."""
    control, model = ragged_control(), tiny_gpt2(dropout=0.0)
    kl = TokenKL(model, control, audit_dtype=BF16)
    previous = reference.policy_of(model, control)
    kl.anchor()
    assert kl().mean == 0.0
    nudge(model, 0.3)
    close(kl(), expected(model, previous, control), rel=0.2)
    assert kl.noise_floor.measured.mean > TokenKL(model, control).noise_floor.measured.mean
    assert model.lm_head.weight is model.transformer.wte.weight


def test_projection_reaches_the_weights_through_the_cast() -> None:
    """Distillation under an audit dtype has gradients for the model's own weights."""
    control, model = ragged_control(), tiny_llama(dtype=torch.float64)
    optimizer = STEPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.3),
        kl=TokenKL(model, control, audit_dtype=torch.float32),
        budget=Budget(mean=1e-3, slices={"late": 1e-4}),
        controller=Project(steps=2),
    )
    for p in model.parameters():
        p.grad = torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(p.numel()))
    optimizer.step()
    assert optimizer.last.action == "project"
    assert optimizer.last.projection["residual"] < optimizer.last.projection["residual_interpolation"]


def test_an_interrupt_in_a_cast_forward_puts_the_weights_back() -> None:
    """The parameters in the modules are the model's own again, whatever was raised."""
    control, model = ragged_control(), tiny_llama(dtype=BF16)
    kl = TokenKL(model, control, audit_dtype=torch.float32)
    kl.anchor()
    own = dict(model.named_parameters())

    def interrupted(*_: object) -> None:
        assert model.model.norm.weight.dtype == torch.float32
        raise KeyboardInterrupt

    hook = model.model.norm.register_forward_hook(interrupted)
    with pytest.raises(KeyboardInterrupt):
        kl()
    hook.remove()
    assert dict(model.named_parameters()) == own
    assert kl().mean == 0.0


@pytest.mark.parametrize("dtype", ["float32", torch.int8, 32])
def test_an_audit_dtype_that_is_none(dtype) -> None:
    """It is refused by name."""
    with pytest.raises(TypeError, match=r"audit_dtype=.*is no floating-point dtype; give torch.float32"):
        TokenKL(tiny_llama(), ragged_control(), audit_dtype=dtype)


class AlwaysDrops(BiasedHead):
    """Dropout that does not know of eval mode."""

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits of half of the hidden units."""
        return self.head(nn.functional.dropout(self.embedding(input_ids), 0.5, training=True))


class Awakens(BiasedHead):
    """Puts itself back into train mode in its forward, with a dropout layer inside."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits of half of the hidden units, whatever the caller wanted."""
        self.train()
        return self.head(self.drop(self.embedding(input_ids)))


class Counts(BiasedHead):
    """Moves a little with every call."""

    calls = 0

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits that depend on how often they were asked for."""
        self.calls += 1
        return super().forward(input_ids) * (1 + 1e-3 * self.calls)


def test_a_count_of_calls_is_put_back() -> None:
    """What a forward counts up is not the policy: every reading begins at the same count, and none is left behind."""
    model = Counts()
    kl = TokenKL(model, ragged_control())
    kl.anchor()
    assert kl().mean == 0.0
    model(torch.tensor([[1, 2]]))  # as training does
    assert kl().mean == 0.0
    assert model.calls == 1


@pytest.mark.parametrize("leak", [AlwaysDrops, Awakens])
def test_a_forward_that_is_no_function_of_the_weights_is_refused(leak) -> None:
    """Unmoved weights that do not read 0 are an error at construction, with the reading and the remedy."""
    model = leak()
    with pytest.raises(ValueError, match=r"unmoved weights read K = \d.* instead of 0.*dropout.*noise_floor=False"):
        TokenKL(model, ragged_control())
    kl = TokenKL(model, ragged_control(), noise_floor=False)
    assert kl.noise_floor is None
    kl.anchor()
    torch.rand(1)  # as training does
    assert kl().mean > 0


def floored() -> tuple[nn.Module, TokenKL]:
    """A bf16 model, and its closure."""
    model = tiny_llama(hidden=64, layers=3, dtype=BF16)
    return model, TokenKL(model, ragged_control())


def test_a_budget_below_the_floor_warns_with_both_numbers() -> None:
    """At construction and in set_budget, for the mean and for slices; a budget above it, and none at all, do not."""
    model, kl = floored()
    floor = kl.noise_floor.measured
    numbers = rf"mean: budget 1e-09, noise floor {floor.mean:.3g}.*audit_dtype=torch.float32"
    with pytest.warns(UserWarning, match=numbers):
        optimizer = trained(model, kl=kl, budget=1e-9)
    with pytest.warns(UserWarning, match=rf"late: budget 1e-10, noise floor {floor.slices['late']:.3g}"):
        optimizer.set_budget(Budget(mean=1.0, slices={"late": 1e-10}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.set_budget(1.01 * floor.mean)
        optimizer.set_budget(math.inf)
        trained(model, kl=kl, budget=0.0)  # nothing may move: no figure is compared


@pytest.mark.parametrize(
    ("make", "helps"),
    [
        (lambda: TokenKL(tiny_llama(dtype=BF16), ragged_control()), True),
        (lambda: TokenKL(tiny_llama(dtype=torch.float16), ragged_control()), True),
        (lambda: TokenKL(adapted(BF16), ragged_control()), True),
        (lambda: TokenKL(tiny_llama(), ragged_control(), audit_dtype=BF16), True),
        (lambda: TokenKL(tiny_llama(), ragged_control()), False),
        (lambda: TokenKL(tiny_llama(dtype=torch.float64), ragged_control()), False),
        (lambda: TokenKL(tiny_llama(dtype=BF16), ragged_control(), audit_dtype=torch.float32), False),
        (lambda: bf16_policy(), False),
    ],
)
def test_an_audit_in_float32_is_recommended_where_it_helps(make, helps) -> None:
    """To a TokenKL that audits in narrower numbers: not to one in float32, nor to a PolicyKL, which has no such way."""
    kl = make()
    with pytest.warns(UserWarning, match="noise floor") as caught:
        STEPOptimizer(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0), kl=unchecked(kl), budget=1e-30)
    (message,) = (str(warning.message) for warning in caught)
    assert ("audit_dtype=torch.float32" in message) == helps
    assert "Raise the budget" in message


def bf16_policy() -> PolicyKL:
    """A policy with a floor of bf16."""
    model = nn.Linear(8, 6).to(BF16)
    return PolicyKL(lambda: model(torch.eye(8, dtype=BF16)))


def unchecked(kl):
    """The closure, for an optimizer of other parameters."""
    kl._check_parameters = False
    return kl


def test_a_schedule_that_comes_down_to_the_floor_warns_once() -> None:
    """When it does, and not at every step after that."""
    model, kl = floored()
    optimizer = trained(model, kl=kl, budget=lambda step: 1.0 if step < 2 else 1e-9, controller=Gate())
    found = []
    for _ in range(4):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        found.append(len([w for w in caught if "noise floor" in str(w.message)]))
    assert found == [0, 0, 1, 0]


def test_the_log_says_how_it_measured(tmp_path) -> None:
    """The first line of a log has the readout, the fallbacks and the noise floor."""
    model = build("gemma2")
    kl = TokenKL(model, ragged_control())
    optimizer = trained(model, kl=kl, budget=1.0, log=tmp_path / "run.jsonl")
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    audit = json.loads((tmp_path / "run.jsonl").read_text().split("\n")[0])["audit"]
    assert audit["readout"] == "rows"
    assert len(audit["fallbacks"]) == 1
    assert audit["noise_floor"]["dtype"] == "float32"
    assert audit["noise_floor"]["measured"]["mean"] == kl.noise_floor.measured.mean


DTYPES = [torch.float32, BF16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
def test_probes_move_what_they_say(dtype) -> None:
    """Every size is the root mean square of the relative movement, also below what the dtype can tell."""
    drawn = torch.randn(200, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight = drawn.to(dtype)
    kept = weight.clone()
    for size in SIZES:
        there = moved_by(weight, size)
        relative = (there.double() / weight.double() - 1)[weight != 0]
        moved = float(relative.square().mean().sqrt())
        assert moved > 0
        assert there.dtype == dtype
        if (size / torch.finfo(dtype).eps) ** 2 * weight.numel() > 100:  # else less than one element should move
            assert 0.6 * size < moved < 1.5 * size, (size, moved)
        assert torch.equal(weight.signbit(), there.signbit())
    assert torch.equal(weight, kept)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_zeros_move_upwards_and_small_weights_move_at_all(dtype, size) -> None:
    """By the size at most; a tensor of few elements moves by one of them where all by less would be rounded away."""
    zeros = moved_by(torch.zeros(9, 9, dtype=dtype), size).double()
    assert (zeros >= 0).all()
    assert 0 < zeros.max() <= size * (1 + torch.finfo(dtype).eps)
    assert (moved_by(torch.ones(3, dtype=dtype), size) != 1).any()


def test_what_is_moved_of_a_huge_weight_is_bounded(monkeypatch) -> None:
    """`MOST` elements of one tensor, spread over it; of several, the smallest that are as many together."""
    monkeypatch.setattr(noise, "MOST", 100)
    huge, small = nn.Parameter(torch.randn(50, 20)), nn.Parameter(torch.randn(90))
    for moved in (moved_away([huge])[id(huge)], moved_by(huge, SIZES[0])):
        assert 50 < int((moved != huge).sum()) <= 100
        assert (moved != huge).any(0).all()
    assert trained_weights([huge, small]) == [small]
    assert trained_weights([huge]) == [huge]


def test_weights_are_moved_away_by_a_part_of_themselves_and_zeros_too() -> None:
    """A tensor of zeros, an adapter's, is moved by as much as one of ones would be."""
    weights = [torch.full((100, 100), 3.0), torch.zeros(100, 100), torch.randn(100, 100)]
    moved = moved_away(weights)
    for weight, size in zip(weights, (3.0, 1.0, 1.0), strict=True):
        off = float((moved[id(weight)] - weight).square().mean().sqrt())
        assert off == pytest.approx(AWAY * size, rel=0.05)


def test_a_model_whose_embedding_is_zero_has_a_floor_all_the_same() -> None:
    """Weights of zero are moved before anything is scaled."""
    model = Bigram()
    with torch.no_grad():
        model.embedding.weight.zero_()
    assert TokenKL(model, ControlSet.from_ids([[1]], [[2]])).noise_floor.measured.mean < 1e-9


def test_a_start_that_gives_no_finite_policy_is_left_for_the_weights_themselves() -> None:
    """Movements begin where there are figures; where there are none at all, there is no floor."""

    def ladder(valid) -> noise.Ladder:
        weight = torch.ones(100)

        def policy(moved) -> Tensor | None:
            return moved[id(weight)] if valid(moved[id(weight)]) else None

        return noise.read_ladder(
            [weight], policy, lambda a, b: Movement(float((a.double() - b.double()).square().sum())), weight
        )

    near, away, never = (
        ladder(valid) for valid in (lambda w: (w - 1).abs().max() < 2 * SIZES[0], lambda w: True, lambda w: False)
    )
    assert near.largest == 0.0
    assert away.largest == pytest.approx(AWAY**2 * 100, rel=0.5)
    for found in (near, away):
        assert [reading.mean for reading, _ in found.readings] == pytest.approx([left for _, left in found.readings])
        assert found.floor(torch.float32).measured.mean == pytest.approx(100 * SIZES[-1] ** 2, rel=0.5)
        assert not found.is_still
    assert never.floor(torch.float32) is None
    assert not never.is_still


def test_token_policies_that_jump_have_no_floor() -> None:
    """What the smallest movement reads like the largest is no rounding."""

    class Jumps(Bigram):
        def forward(self, input_ids: Tensor) -> Tensor:
            return super().forward(input_ids) + 5 * torch.sin(1e12 * self.head.weight.double().sum(1)).float()

    assert TokenKL(Jumps(), ragged_control()).noise_floor is None
