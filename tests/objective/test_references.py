"""Reference policies: against copied models and loops in float64; and nothing of a call may be left behind."""

from __future__ import annotations

import copy
import io
import math
import re

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from step_optim import Gate, Interpolate, STEPOptimizer, TokenKL
from step_optim.objective import EMAReference, FixedReference, RatchetReference, Reference, ReferenceAction
from step_optim.snapshot.tensors import same_bits
from tests import reference as oracle
from tests.models import VOCAB, Bigram, nudge, ragged_control, tiny_gpt2, tiny_llama, tiny_qwen
from tests.strategies import bits

KEPT, MOVED, HELD = ReferenceAction
IDS = torch.arange(24).view(4, 6) % VOCAB


def lora(seed: int = 0, dtype: torch.dtype = torch.float32, **options):
    """Llama with a LoRA adapter that has moved a little from zero."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.2, **options)
        model = peft.get_peft_model(tiny_llama(seed=seed), config).to(dtype)
    nudge(model, 0.2)
    return model


class Recurrent(nn.Module):
    """An LSTM keeps its weights in a list besides, too. [B, T] -> [B, T, V]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.body, self.head = nn.Embedding(VOCAB, 6), nn.LSTM(6, 5), nn.Linear(5, VOCAB)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.body(self.embed(input_ids))[0])


def weight_normed() -> nn.Module:
    model = Bigram()
    parametrizations.weight_norm(model.head)
    return model


MODELS = {
    "plain": Bigram,
    "lstm": Recurrent,
    "weight norm": weight_normed,
    "llama": tiny_llama,
    "tied llama": lambda: tiny_llama(tied=True),
    "tied qwen": tiny_qwen,
    "gpt2": tiny_gpt2,
    "lora": lora,
    "bf16 lora": lambda: lora(dtype=torch.bfloat16),
    "dora": lambda: lora(use_dora=True),
    "lora, head trained in full": lambda: lora(modules_to_save=["lm_head"]),
    "ddp look-alike": lambda: DistributedDataParallel(lora()),
    "compiled": lambda: torch.compile(Bigram(), backend="eager"),
}


class DistributedDataParallel(nn.Module):
    """Of torch's only what matters here: its name, and the prefix that it puts before all others."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        pytest.fail("the module inside is to be run: not every process is in this forward")


def logits(out) -> Tensor:
    return out if isinstance(out, Tensor) else out.logits


def kept(reference: Reference) -> dict[str, Tensor]:
    return reference.state_dict()["weights"]


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def marks(model: nn.Module) -> list:
    """Identity, place, version and bits of every tensor; the gradients."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    return [(name, id(t), t.data_ptr(), t._version, t.requires_grad, id(t.grad), bits(t)) for name, t in tensors]


def restored(state):
    """Through a file, as a careful user reads it."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", MODELS)
def test_a_reference_is_a_copy_of_the_model_as_it_was(name, train) -> None:
    """Its logits are a copied model's, bit for bit (dropout included), and neither model's tensors are touched."""
    model = MODELS[name]().train(train)
    inside = getattr(model, "_orig_mod", getattr(model, "module", model))
    twin, fixed = copy.deepcopy(inside), FixedReference(model)
    nudge(model, 0.5)
    for p in trained(model):
        p.grad = torch.ones_like(p)
    before = marks(model)
    with torch.no_grad():
        torch.manual_seed(1)
        expected, policy = logits(twin(IDS)), logits(inside(IDS))
    torch.manual_seed(1)
    found = logits(fixed(IDS))
    assert same_bits(found, expected)
    assert not torch.allclose(found, policy, rtol=1e-2), "the policy did not move, which tests nothing"
    assert not found.requires_grad
    assert marks(model) == before
    assert all(not weight.requires_grad for weight in kept(fixed).values())


def test_a_reference_takes_what_the_model_takes() -> None:
    """Masks, positions, caches and fewer logits go through."""
    model = lora().eval()
    twin, fixed = copy.deepcopy(model), FixedReference(model)
    nudge(model, 0.5)
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    options = {"attention_mask": mask, "position_ids": positions, "logits_to_keep": 3}
    with torch.no_grad():
        expected = twin(input_ids=IDS, use_cache=True, **options)
    found = fixed(input_ids=IDS, use_cache=True, **options)
    assert found.logits.shape == (4, 3, VOCAB)
    assert same_bits(found.logits, expected.logits)
    ahead = {"attention_mask": torch.cat([mask, mask[:, :1] * 0 + 1], 1), "position_ids": positions[:, -1:] + 1}
    with torch.no_grad():
        after = twin(IDS[:, :1], past_key_values=expected.past_key_values, **ahead).logits
    assert same_bits(fixed(IDS[:, :1], past_key_values=found.past_key_values, **ahead).logits, after)


def test_gradients_reach_the_policy_and_not_the_reference() -> None:
    """A KL penalty's gradient is that against constant logits, also if the reference runs before the backward pass."""
    model = lora().eval()
    fixed = FixedReference(model)
    nudge(model, 0.3)

    def gradients(logits_of_reference) -> list[Tensor]:
        model.zero_grad()
        policy = model(IDS).logits.log_softmax(-1)
        other = logits_of_reference().log_softmax(-1)
        (policy.exp() * (policy - other)).sum(-1).mean().backward()
        return [p.grad for p in trained(model)]

    constant = fixed(IDS).logits
    assert bits(gradients(lambda: fixed(IDS).logits)) == bits(gradients(lambda: constant))


def test_autocast_casts_the_references_weights_and_not_the_policys() -> None:
    """Autocast keeps casts of weights for as long as it is on."""
    model = Bigram()
    twin, fixed = copy.deepcopy(model), FixedReference(model)
    nudge(model, 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        policy = model(IDS)
        assert same_bits(fixed(IDS), twin(IDS).detach())
        assert same_bits(model(IDS), policy)
        policy.float().square().mean().backward()
    assert model.head.weight.grad.abs().sum() > 0


def test_only_what_is_trained_is_kept() -> None:
    """Under LoRA that is the adapter; tied weights are kept once; the base is the model's own."""
    model = lora()
    for made in (FixedReference(model), EMAReference(model), RatchetReference(model)):
        assert sum(w.numel() for w in kept(made).values()) == sum(p.numel() for p in trained(model))
        assert all("lora_" in name for name in kept(made))
        assert not isinstance(made, nn.Module), "a module that holds it would train it"
    tied = tiny_llama(tied=True)
    assert len(kept(FixedReference(tied))) == len(list(tied.parameters()))
    fixed = FixedReference(model.eval())
    with torch.no_grad():
        model.base_model.model.lm_head.weight.mul_(2)
    assert same_bits(fixed(IDS).logits, model(IDS).logits.detach()), "the frozen part is shared"


def test_buffers_and_modes_are_the_models() -> None:
    """As documented: BatchNorm in training mode counts a reference's forward in, in eval mode it does not."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    fixed = FixedReference(model)
    fixed(torch.randn(5, 3))
    assert model[1].num_batches_tracked == 1
    model.eval()
    fixed(torch.randn(5, 3))
    assert model[1].num_batches_tracked == 1
    assert not any(module.training for module in model.modules())


def test_named_parameters_are_kept_and_others_are_the_models() -> None:
    """A value head that the reference is not asked for need not be kept."""
    model = Bigram().eval()
    fixed = FixedReference(model, parameters=model.head.parameters())
    assert list(kept(fixed)) == ["head.weight"]
    expected = nn.functional.linear(model.embedding(IDS) * 3, model.head.weight.clone()).detach()
    with torch.no_grad():
        model.embedding.weight.mul_(3)
        model.head.weight.mul_(2)
    assert torch.allclose(fixed(IDS), expected)
    assert not fixed(IDS).requires_grad, "nor does a gradient reach what is shared and trained"


# --- moving ---------------------------------------------------------------------------------------------------------


@st.composite
def paths(draw: st.DrawFn):
    """A model, and policies one after another: [(weights by name, drift)]."""
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
    model = Bigram(seed=draw(st.integers(0, 99)), dtype=dtype)
    seed, size = draw(st.integers(0, 999)), draw(st.sampled_from([1e-4, 0.1, 3.0]))
    drifts = draw(st.lists(st.floats(0, 1) | st.sampled_from([0.5, math.inf]), min_size=1, max_size=9))
    return model, [(lambda i=i: nudge(model, size, seed + i), drift) for i, drift in enumerate(drifts)]


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@given(paths(), st.floats(0, 1) | st.sampled_from([0.0, 0.05, 0.95, 1.0]))
def test_an_ema_is_the_loop_in_float64(path, decay) -> None:
    """w_ref <- decay w_ref + (1 - decay) w; decay 0 is the policy and 1 the first policy, bit for bit."""
    model, policies = path
    first, ema = snapshot(model), EMAReference(model, decay)
    expected = {name: w.double() for name, w in first.items()}
    for move, _ in policies:
        move()
        assert ema.update() is (KEPT if decay == 1 else MOVED)
        for name, w in model.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * w.detach().double()
    for name, found in kept(ema).items():
        assert found.dtype == torch.promote_types(first[name].dtype, torch.float32)
        scale = float(expected[name].abs().max())
        assert torch.allclose(found.double(), expected[name], rtol=1e-6, atol=1e-6 * scale)
    for exact, twin in ((0, model), (1, Bigram(dtype=first["head.weight"].dtype))):
        if decay == exact:
            twin.load_state_dict(first if exact else snapshot(model))
            assert same_bits(ema(IDS), twin(IDS).detach())


def test_an_ema_of_an_unmoved_policy_stays_bit_for_bit() -> None:
    """Rounding must not let a reference drift away by itself."""
    model = Bigram()
    before, ema = snapshot(model), EMAReference(model, 0.37)
    for _ in range(50):
        ema.update()
    assert bits(kept(ema)) == bits(before)


def test_an_ema_of_bf16_weights_feels_small_changes() -> None:
    """A change that bf16 would round away in every single update adds up."""
    model = Bigram(dtype=torch.bfloat16)
    with torch.no_grad():
        model.head.weight.fill_(1.0)
    ema = EMAReference(model, 0.999)
    with torch.no_grad():
        model.head.weight.fill_(1.5)
    for _ in range(1000):
        ema.update()
    assert float(kept(ema)["head.weight"].mean()) == pytest.approx(1.5 - 0.5 * 0.999**1000, rel=1e-5)
    assert ema(IDS).dtype == torch.bfloat16


def test_a_decay_of_0_or_1_is_exact_for_all_numbers() -> None:
    """0 times NaN is NaN, and -0 minus -0 is +0: neither may get into what is promised bit for bit."""
    model = Bigram()
    before, fixed = snapshot(model), EMAReference(model, 1.0)
    with torch.no_grad():
        model.head.weight.fill_(math.nan)
    policy = EMAReference(model, 0.0)
    fixed.update()
    assert bits(kept(fixed)) == bits(before)
    for value in (math.inf, -0.0, -0.0, 1e-45):
        with torch.no_grad():
            model.head.weight.fill_(value)
        policy.update()
        assert bits(kept(policy)) == bits(snapshot(model))


@given(paths(), st.integers(1, 4), st.none() | st.floats(0, 1) | st.just(0.5))
def test_a_ratchet_takes_every_nth_policy_within_its_cap(path, every, cap) -> None:
    """It is always a policy that was there, bit for bit, and never one beyond the cap."""
    model, policies = path
    expected, ratchet = snapshot(model), RatchetReference(model, every, cap)
    counts = dict.fromkeys(ReferenceAction, 0)
    for t, (move, drift) in enumerate(policies, start=1):
        move()
        due, within = t % every == 0, cap is None or drift <= cap
        action = ratchet.update(drift if cap is not None else None)
        assert action is (KEPT if not due else MOVED if within else HELD)
        counts[action] += 1
        expected = snapshot(model) if due and within else expected
        assert bits(kept(ratchet)) == bits(expected)
    assert (ratchet.updates, ratchet.moves, ratchet.holds) == (len(policies), counts[MOVED], counts[HELD])


def test_a_fixed_reference_counts_and_stays() -> None:
    """It can stand where the others do: it takes any drift, and reads none."""
    model = Bigram()
    before, fixed = snapshot(model), FixedReference(model)
    for drift in (None, 0.1, math.nan):
        nudge(model, 0.1)
        assert fixed.update(drift) is KEPT
    assert (fixed.updates, fixed.moves, fixed.holds) == (3, 0, 0)
    assert bits(kept(fixed)) == bits(before)


def test_what_became_of_a_reference_is_a_text() -> None:
    """So that it can be logged as it is."""
    assert [str(action) for action in ReferenceAction] == ["kept", "moved", "held"]
    assert KEPT == "kept"


# --- beside STEPOptimizer -------------------------------------------------------------------------------------------


class Loop:
    """LoRA training under STEP; counts how often a reference was taken anew, and audits."""

    def __init__(self, budget: float, controller=None) -> None:
        self.model = lora().eval()
        self.kl = TokenKL(self.model, ragged_control())
        inner = torch.optim.AdamW(trained(self.model), lr=0.05)
        self.optimizer = STEPOptimizer(inner, kl=self.kl, budget=budget, controller=controller)
        self.anchored, self.audited = 0, 0
        anchor, audited = self.kl.anchor, self.kl._audited

        def counted(audit=None) -> None:
            self.anchored += audit is None
            anchor(audit)

        def counted_audit(**options):
            self.audited += 1
            return audited(**options)

        self.kl.anchor, self.kl._audited = counted, counted_audit

    def step(self, t: int) -> None:
        self.optimizer.zero_grad()
        self.model((IDS + t) % VOCAB).logits.log_softmax(-1)[..., 0].mean().neg().backward()
        self.optimizer.step()

    def bits(self) -> list:
        """Of the weights and of the inner optimizer's state."""
        state = self.optimizer.optimizer.state
        return bits([list(self.model.parameters()), [list(of.values()) for of in state.values()]])


@pytest.mark.parametrize("make", [FixedReference, lambda model: EMAReference(model, 0.5), RatchetReference])
def test_a_reference_costs_no_audit_and_changes_no_bit_of_a_run(make) -> None:
    """Called before, and after, and updated between steps, the run is the one without it, in audits and in bits."""
    alone, beside = Loop(1e-3, Interpolate()), Loop(1e-3, Interpolate())
    made = make(beside.model)
    for t in range(4):
        alone.step(t)
        made(IDS)
        beside.step(t)
        made.update(beside.optimizer.last.reference_drift.mean)
        made(IDS)
        assert beside.optimizer.last.triggered == alone.optimizer.last.triggered
    assert alone.optimizer.last.triggered
    assert (beside.anchored, beside.audited) == (alone.anchored, alone.audited)
    assert beside.anchored == 1
    assert beside.bits() == alone.bits()


def test_a_reference_may_be_called_within_a_window() -> None:
    """The penalty of every minibatch needs it."""
    loop = Loop(1e-3)
    made = RatchetReference(loop.model)
    for _ in range(3):
        with loop.optimizer.window():
            for t in range(2):
                loop.optimizer.zero_grad()
                policy, other = (m((IDS + t) % VOCAB).logits.log_softmax(-1) for m in (loop.model, made))
                (policy.exp() * (policy - other)).sum(-1).mean().add(-policy[..., 0].mean()).backward()
                loop.optimizer.step()
        made.update()
    assert loop.anchored == 1
    assert bits(kept(made)) == bits({name: p for name, p in snapshot(loop.model).items() if "lora_" in name})


def test_a_rejected_step_leaves_references_alone() -> None:
    """A rollback restores the policy, and no reference is part of that; nor does it become a policy that was undone."""
    loop = Loop(1e-12, Gate())
    first = bits({name: p for name, p in snapshot(loop.model).items() if "lora_" in name})
    references = [FixedReference(loop.model), EMAReference(loop.model, 0.5), RatchetReference(loop.model)]
    nudge(loop.model, 0.3)
    references[1].update()
    average = bits(kept(references[1]))
    loop.step(0)
    assert str(loop.optimizer.last.action) == "reject"
    assert [bits(kept(made)) for made in references] == [first, average, first]


def test_a_capped_ratchet_stays_near_the_first_policy() -> None:
    """With the drift that STEP measures: the reference's own KL from the first policy, by brute force, is within it."""
    loop = Loop(math.inf)
    control, cap = loop.kl.control, 0.05
    first = oracle.policy_of(loop.model, control)
    ratchet, seen, far = RatchetReference(loop.model, cap=cap), set(), 0.0
    for t in range(8):
        loop.step(t)
        seen.add(ratchet.update(loop.optimizer.last.reference_drift.mean))
        far = max(far, loop.optimizer.last.reference_drift.mean)
        twin = copy.deepcopy(loop.model)
        twin.load_state_dict(kept(ratchet), strict=False)
        assert oracle.movement(oracle.policy_of(twin, control), first, {}).mean <= cap * (1 + 1e-5)
    assert seen == {MOVED, HELD}
    assert far > cap


# --- checkpoints ----------------------------------------------------------------------------------------------------


MAKERS = {
    "fixed": FixedReference,
    "ema": lambda model: EMAReference(model, 0.7),
    "ratchet": lambda model: RatchetReference(model, every=2, cap=0.5),
}


@given(paths(), st.sampled_from(sorted(MAKERS)), st.integers(0, 9))
def test_a_run_that_was_saved_goes_on_as_if_it_had_not_been(path, kind, at) -> None:
    """Through a file that holds plain values and tensors only; at any point, into a model that has moved on."""
    model, policies = path
    straight = resumed = MAKERS[kind](model)
    for t, (move, drift) in enumerate(policies):
        if t == at:
            saved = restored(straight.state_dict())
            resumed = MAKERS[kind](model)
            resumed.load_state_dict(saved)
        move()
        action = straight.update(drift)
        assert resumed is straight or resumed.update(drift) is action
    assert bits(resumed.state_dict()) == bits(straight.state_dict())
    assert same_bits(resumed(IDS), straight(IDS))


def test_a_state_is_a_copy_both_ways() -> None:
    """Neither what was saved nor what was loaded is written into later."""
    model = Bigram()
    ema = EMAReference(model, 0.5)
    state = ema.state_dict()
    held = bits(state)
    nudge(model, 1.0)
    ema.update()
    assert bits(state) == held
    ema.load_state_dict(state)
    state["weights"]["head.weight"].zero_()
    assert bits(ema.state_dict()) == held
    ema.state_dict()["weights"]["head.weight"].zero_()
    assert bits(ema.state_dict()) == held


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s["weights"].pop("head.weight"), "'head.weight'"),
        (lambda s: s["weights"].update(stranger=torch.ones(1)), "'stranger'"),
        (lambda s: s["weights"].update({"head.weight": torch.ones(2, 3)}), r"'head.weight'.*\(2, 3\).*\(61, 8\)"),
        (lambda s: s["weights"].update({"head.weight": None}), "'head.weight'"),
        (lambda s: s.pop("weights"), "weights"),
        (lambda s: s.update(weights=3), "weights"),
        (lambda s: s.pop("moves"), "moves"),
        (lambda s: s.update(updates=-1), "updates.*-1"),
        (lambda s: s.update(holds=0.5), "holds.*0.5"),
    ],
)
def test_a_damaged_state_is_refused_before_anything_changes(damage, message) -> None:
    """The message names what is wrong with it."""
    model = Bigram()
    other = EMAReference(Bigram(seed=1), 0.5)
    other.update()
    state = other.state_dict()
    damage(state)
    ema = EMAReference(model)
    before = bits(ema.state_dict())
    with pytest.raises(ValueError, match=message):
        ema.load_state_dict(state)
    assert bits(ema.state_dict()) == before


# --- moved models, and models that cannot be --------------------------------------------------------------------------


@pytest.mark.parametrize("make", [FixedReference, EMAReference, RatchetReference])
def test_a_reference_follows_a_model_to_another_dtype(make) -> None:
    """Weights are rounded when the model runs; a state comes back in the precision that is kept."""
    model = Bigram()
    made, twin = make(model), copy.deepcopy(model)
    model.to(torch.bfloat16)
    assert same_bits(made(IDS), twin.to(torch.bfloat16)(IDS).detach())
    made.load_state_dict(made.state_dict())
    made.update()
    model.to(torch.float64)
    assert made(IDS).dtype == torch.float64
    made.update()
    assert made(IDS).dtype == torch.float64


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("make", [FixedReference, EMAReference, RatchetReference])
def test_a_reference_follows_a_model_to_another_device(make) -> None:
    """In calls, in updates, and in loading a state that was read onto the CPU."""
    model = lora().eval()
    made = make(model)
    state = made.state_dict()
    model.cuda()
    assert made(IDS.cuda()).logits.is_cuda
    made.update()
    made.load_state_dict(state)
    assert all(weight.is_cuda for weight in kept(made).values())


def named(*parts: str) -> str:
    return "(?s)" + ".*".join(re.escape(part) for part in parts)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: FixedReference(lambda ids: ids), TypeError, named("model=", "no torch module")),
        (lambda: FixedReference(Bigram().requires_grad_(False)), ValueError, named("nothing to keep", "parameters=")),
        (lambda: FixedReference(Bigram(), []), ValueError, named("nothing to keep")),
        (lambda: FixedReference(Bigram(), Bigram().parameters()), ValueError, named("parameters", "2 of the 2")),
        (lambda: EMAReference(Bigram(), -0.1), ValueError, named("decay=-0.1", "between 0", "1")),
        (lambda: EMAReference(Bigram(), 1.1), ValueError, named("decay=1.1")),
        (lambda: EMAReference(Bigram(), math.nan), ValueError, named("decay=nan")),
        (lambda: RatchetReference(Bigram(), 0), ValueError, named("every=0", "at least 1")),
        (lambda: RatchetReference(Bigram(), 1.5), ValueError, named("every=1.5", "whole")),
        (lambda: RatchetReference(Bigram(), cap=-1.0), ValueError, named("cap=-1.0", "nats per token", "None")),
        (lambda: RatchetReference(Bigram(), cap=math.nan), ValueError, named("cap=nan")),
    ],
)
def test_bad_arguments_are_refused(make, error, message) -> None:
    """With the argument, its value, the bound and the remedy."""
    with pytest.raises(error, match=message):
        make()


def test_an_average_of_whole_numbers_is_refused() -> None:
    """Quantised weights can be kept, and not averaged."""
    model = Bigram()
    model.code = nn.Parameter(torch.ones(2, dtype=torch.uint8), requires_grad=False)
    FixedReference(model, model.parameters())
    with pytest.raises(ValueError, match=r"'code' is torch.uint8"):
        EMAReference(model, 0.5, model.parameters())


@pytest.mark.parametrize("drift", [None, math.nan, -0.1])
def test_a_capped_ratchet_says_which_drift_it_needs(drift) -> None:
    """At the first update, not at the one that is due; and nothing is counted."""
    ratchet = RatchetReference(Bigram(), every=3, cap=0.1)
    with pytest.raises(ValueError, match=named(f"drift={drift}", "optimizer.last.reference_drift.mean")):
        ratchet.update(drift)
    assert ratchet.updates == 0
    assert RatchetReference(Bigram()).update(drift) is MOVED, "without a cap none is read"


def test_an_error_in_the_model_leaves_the_policys_weights_in_place() -> None:
    """The reference's must not stay in the model."""
    model = lora()
    fixed, before = FixedReference(model), marks(model)
    with pytest.raises(IndexError):
        fixed(IDS + VOCAB)
    assert marks(model) == before


def test_a_model_that_trains_more_than_was_kept_is_refused() -> None:
    """Such a weight is shared: the reference would silently move with the policy."""
    model = lora()
    ratchet, chosen = RatchetReference(model), FixedReference(model, trained(model))
    model.base_model.model.lm_head.requires_grad_(True)
    for use in (lambda: ratchet(IDS), ratchet.update):
        with pytest.raises(RuntimeError, match=named("lm_head", "is trained now", "parameters=")):
            use()
    assert ratchet.updates == 0
    chosen(IDS)  # its weights were named: what else is trained is the caller's decision


def test_a_model_that_was_wrapped_afterwards_is_refused() -> None:
    """PEFT renames the weights of the model that it adapts."""
    model = tiny_llama()
    fixed = FixedReference(model)
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(RuntimeError, match=named("q_proj.weight", "any more", "before making")):
        fixed(IDS)


def test_a_sharded_model_is_refused() -> None:
    """Its forward would read the policy's weights, and call them the reference's."""
    model = type("FullyShardedDataParallel", (DistributedDataParallel,), {})(Bigram())
    with pytest.raises(ValueError, match=named("FSDP", "second model")):
        FixedReference(model)


def test_cached_parametrizations_are_refused() -> None:
    """The cache would give each policy the other's weights."""
    fixed = FixedReference(weight_normed())
    with parametrize.cached(), pytest.raises(RuntimeError, match=named("parametrize.cached", "outside")):
        fixed(IDS)
    fixed(IDS)
