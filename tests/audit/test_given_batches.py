"""TokenKL on batches as processors make them: every kind of model against a float64 oracle, and what it refuses."""

from __future__ import annotations

import copy
import io
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from step_optim import Budget, ControlSet, Gate, Interpolate, Project, Steer, STEPOptimizer, TokenKL
from step_optim.audit import batches as layouts
from step_optim.audit.batches import Shard
from step_optim.isolation.eval_mode import isolated
from tests import reference
from tests.batches import (
    KINDS,
    SLICES,
    answered,
    movement,
    others,
    policy_of,
    seen,
    short,
    spoken,
    t5,
    told,
    translated,
    whisper,
)
from tests.models import VOCAB, Bigram, nudge, ragged_control, tiny_llama

EVERY = pytest.mark.parametrize("name", KINDS)


def measured(name: str, **options) -> tuple[nn.Module, TokenKL]:
    """A model in train mode, and a TokenKL on the batches of its kind."""
    model = KINDS[name].build(0)
    kl = TokenKL(model, ControlSet.from_batches(KINDS[name].batches(), SLICES), **options)
    kl.anchor()
    return model, kl


@EVERY
def test_movement_equals_the_oracle(name) -> None:
    """Global, by slice and by example, and the drift; exactly 0 at rest, dropout or not."""
    kind, (model, kl) = KINDS[name], measured(name)
    assert kl.readout == kind.readout
    assert kl().mean == 0.0
    origin = policy_of(model, kind.batches(), shift=kind.shift)
    nudge(model, 0.1, seed=3)
    kl.anchor()
    previous = policy_of(model, kind.batches(), shift=kind.shift)
    for seed, size in ((4, 0.2), (5, 1e-2)):
        nudge(model, size, seed=seed)
        audit = kl.audit()
        for found, before in ((audit.movement, previous), (kl.drift(audit), origin)):
            wanted = movement(kind, model, before, SLICES)
            assert found.mean == reference.near(wanted.mean, 1e-4)
            for part, figure in wanted.slices.items():
                assert found.slices[part] == reference.near(figure, 1e-4)
    assert kl.noise_floor is not None


@EVERY
def test_every_readout_agrees(name) -> None:
    """Hidden states and rows, where a model allows them, read what its logits of whole batches say."""
    model, kl = measured(name, noise_floor=False)
    with isolated([model]):
        for batch in kl._layout.batches:
            truth = kl._reading.rows(batch, readout="full")
            if kl.readout != "full":
                torch.testing.assert_close(kl._reading.rows(batch, readout="rows"), truth)


@EVERY
def test_labels_never_reach_the_model(name) -> None:
    """No loss is computed; the model is called with its own arguments, by their names."""
    model, kl = measured(name, noise_floor=False)
    calls = []
    model.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    kl()
    for args, kwargs in calls:
        assert args == ()
        assert "labels" not in kwargs
        assert any(isinstance(value, Tensor) for value in kwargs.values())
    assert len(calls) == len(KINDS[name].batches())


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["t5", "whisper", "bert", "tagger", "llava", "gemma2"])
def test_gradients_equal_autograd_in_float64(name, recompute) -> None:
    """Of the mean, a slice, and the drift of a slice; through every readout."""
    kind, (model, kl) = KINDS[name], measured(name, noise_floor=False, recompute=recompute)
    origin = log_probs(model, kind)
    nudge(model, 0.2, seed=3)
    kl.anchor()
    previous = log_probs(model, kind)
    nudge(model, 0.2, seed=4)
    names, parameters = zip(*((name, p) for name, p in model.named_parameters() if p.requires_grad), strict=True)
    constraints = ("mean", "slice:first", "drift:second")
    for constraint, normal in zip(constraints, kl.gradients(constraints, parameters), strict=True):
        part = constraint.partition(":")[2]
        before = origin if constraint.startswith("drift") else previous
        value, wanted = differentiated(model, kind, before, SLICES[part] if part else [0, 1, 2], names)
        assert normal.value == pytest.approx(value, rel=1e-4)
        off = sum(float((f.double() - w).square().sum()) for f, w in zip(normal.gradient, wanted, strict=True))
        assert math.sqrt(off) <= 1e-4 * math.sqrt(sum(float(w.square().sum()) for w in wanted))


def log_probs(model: nn.Module, kind) -> list[Tensor]:
    """[T_x, V] of each example, float64."""
    with torch.no_grad():
        return list(_log_probs(copy.deepcopy(model).double().eval(), kind))


def _log_probs(twin: nn.Module, kind):
    for batch in kind.batches():
        wide = {name: t.double() if t.is_floating_point() else t for name, t in batch.items()}
        logits = twin(**wide).logits
        for row, labels in enumerate(batch["labels"]):
            places = (labels != -100).nonzero().flatten() - int(kind.shift)
            yield logits[row, places].log_softmax(-1)


def differentiated(
    model: nn.Module, kind, before: list[Tensor], chosen: list[int], names: list[str]
) -> tuple[float, list[Tensor]]:
    """Mean over examples of the mean over their positions of KL, and its gradient."""
    twin = copy.deepcopy(model).double().eval()
    rows = list(_log_probs(twin, kind))
    kls = [(rows[i].exp() * (rows[i] - before[i])).sum(-1).mean() for i in chosen]
    total = torch.stack(kls).mean()
    named = dict(twin.named_parameters())
    found = torch.autograd.grad(total, [named[name] for name in names], allow_unused=True)
    return float(total.detach()), [
        torch.zeros_like(named[name]) if g is None else g for name, g in zip(names, found, strict=True)
    ]


def test_a_causal_model_reads_what_prompts_and_responses_read() -> None:
    """Padded on the right and shifted, batches are the prompts of `from_ids`."""
    model = tiny_llama()
    pairs = [([5, 6], [21, 22, 23]), ([7, 8, 9], [24]), ([11], [25, 26])]
    plain = TokenKL(model, ControlSet.from_ids(*zip(*pairs, strict=True), {"a": [0, 1]}))
    batched = TokenKL(model, ControlSet.from_batches([answered(pairs[:2]), answered(pairs[2:])], {"a": [0, 1]}))
    whole = TokenKL(model, ControlSet.from_batches([answered(pairs)], {"a": [0, 1]}, shift=True))
    closures = (plain, batched, whole)
    for kl in closures:
        kl.anchor()
    for seed, size in enumerate((0.3, 1e-3)):
        nudge(model, size, seed=seed)
        one, two, three = (kl() for kl in closures)
        for other in (two, three):
            assert other.mean == pytest.approx(one.mean, rel=1e-6)
            assert other.slices["a"] == pytest.approx(one.slices["a"], rel=1e-6)


CONTROLLERS = [Gate(), Interpolate(), Project(steps=2), Steer()]


@pytest.mark.parametrize("controller", CONTROLLERS, ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("name", ["t5", "tagger", "llava"])
def test_budgets_hold(name, controller) -> None:
    """Every controller keeps every commit inside the budgets, by the oracle, with a pool of the same kind."""
    kind, model = KINDS[name], KINDS[name].build(0)
    pool = ControlSet.from_batches(others(kind.batches()), SLICES)
    kl = TokenKL(model, ControlSet.from_batches(kind.batches(), SLICES), pool=pool)
    inner = torch.optim.SGD(model.parameters(), lr=0.5)
    budget = Budget(mean=1e-3, slices=2e-3, drift=5e-3)
    optimizer = STEPOptimizer(inner, kl=kl, budget=budget, controller=controller)
    origin = previous = policy_of(model, kind.batches(), shift=kind.shift)
    triggered = 0
    for _ in range(4):
        model(**kind.batches()[0]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        triggered += optimizer.last.triggered
        moved = movement(kind, model, previous, SLICES)
        assert reference.within(moved, 1e-3 * (1 + 1e-4), dict.fromkeys(SLICES, 2e-3 * (1 + 1e-4)))
        assert movement(kind, model, origin, {}).mean <= 5e-3 * (1 + 1e-4)
        previous = policy_of(model, kind.batches(), shift=kind.shift)
    assert triggered
    assert optimizer.last.accepted.mean == reference.near(moved.mean, 1e-4)


def test_draws_from_a_pool_count_what_was_drawn() -> None:
    """A batch is evaluated whole; its other rows count nothing. At rest a penalty is 0, however many are drawn."""
    kind, model = KINDS["t5"], t5()
    pool = ControlSet.from_batches(others(translated()), {"first": [0], "second": [1, 2]})
    kl = TokenKL(model, ControlSet.from_batches(kind.batches(), SLICES), noise_floor=False, pool=pool)
    kl.anchor()
    assert [kl.penalty(count).item() for count in range(1, 5)] == pytest.approx([0.0] * 4, abs=1e-10)
    twin_kind = replace(kind, batches=lambda: others(translated()))
    origin = log_probs(model, twin_kind)
    nudge(model, 0.3)
    parameters, names = list(model.parameters()), [name for name, _ in model.named_parameters()]
    for turn in range(3):
        draw = kl.draw(1, turn, ["drift"])
        value, wanted = differentiated(model, twin_kind, origin, list(draw.prompts), names)
        (normal,) = kl.gradients(["drift"], parameters, draw)
        assert normal.value == pytest.approx(value, rel=1e-4)
        for found, gradient in zip(normal.gradient, wanted, strict=True):
            torch.testing.assert_close(found.double(), gradient, rtol=1e-3, atol=1e-5)


def test_spans_and_a_held_out_set() -> None:
    """Places among the measured positions of each example; and examples that only tell how far budgets hold."""
    kind, model = KINDS["t5"], t5()
    elsewhere = replace(kind, batches=lambda: others(translated()))
    held_out = ControlSet.from_batches(elsewhere.batches())
    control = ControlSet.from_batches(kind.batches())
    kl = TokenKL(model, control, spans={"end": (-1, None)}, held_out=held_out, every=1)
    optimizer = STEPOptimizer(torch.optim.SGD(model.parameters(), lr=0.05), kl=kl, budget=1.0)
    before = [policy_of(model, each.batches(), shift=False) for each in (kind, elsewhere)]
    model(**translated()[0]).loss.backward()
    optimizer.step()
    record = optimizer.last
    after = [policy_of(model, each.batches(), shift=False) for each in (kind, elsewhere)]
    ends = [reference.row_kl(new[-1], old[-1]) for new, old in zip(after[0], before[0], strict=True)]
    assert record.accepted.slices["end"] == reference.near(sum(ends) / 3, 1e-4)
    assert record.held_out.mean == reference.near(reference.movement(after[1], before[1], {}).mean, 1e-4)
    with pytest.raises(ValueError, match="prompt 1 of the held-out set is prompt 0 of the pool"):
        TokenKL(model, control, pool=held_out.select([1]), held_out=held_out)
    ask = [ControlSet.from_batches([answered([([token], [answer])])]) for token, answer in ((5, 20), (6, 21), (6, 22))]
    with pytest.raises(ValueError, match="prompt 0 of the held-out set is prompt 0 of the pool"):
        TokenKL(tiny_llama(), ask[0], pool=ask[1], held_out=ask[2])


def test_a_pool_is_of_the_same_kind_and_shares_no_example() -> None:
    """An example is what the model is given of it: not its labels, not its padding."""
    control = ControlSet.from_batches(translated())
    model, shared = t5(), translated()[1]
    shared["input_ids"] = torch.cat([shared["input_ids"], torch.zeros(1, 2, dtype=torch.long)], 1)
    shared["attention_mask"] = torch.cat([shared["attention_mask"], torch.zeros(1, 2, dtype=torch.long)], 1)
    shared["labels"] = torch.tensor([[40, 41]])
    with pytest.raises(ValueError, match="prompt 0 of the pool is prompt 2 of the control set"):
        TokenKL(model, control, pool=ControlSet.from_batches([shared]))
    with pytest.raises(TypeError, match="give both as batches, or both as prompts"):
        TokenKL(model, control, pool=ragged_control())
    with pytest.raises(TypeError, match="give both as batches, or both as prompts"):
        TokenKL(tiny_llama(), ragged_control(), pool=ControlSet.from_batches(told()))
    unknown = {**others(translated())[0], "labels": torch.tensor([[61], [1]])}
    with pytest.raises(ValueError, match="batch 0, row 0: the label 61 is none of the 61"):
        TokenKL(model, control, pool=ControlSet.from_batches([unknown]))


def test_the_answer_of_a_causal_model_is_no_part_of_its_example() -> None:
    """The same question with another answer is the same example; the same question about another picture is not."""
    model = tiny_llama()
    control = ControlSet.from_batches([answered([([5, 6], [21, 22])])])
    with pytest.raises(ValueError, match="prompt 0 of the pool is prompt 0 of the control set"):
        TokenKL(model, control, pool=ControlSet.from_batches([answered([([5, 6], [30])])]))
    look = seen()[:1]
    kl = TokenKL(KINDS["llava"].build(0), ControlSet.from_batches(look), pool=ControlSet.from_batches(others(look)))
    assert kl.pool is not None
    with pytest.raises(ValueError, match="prompt 0 of the pool is prompt 0 of the control set"):
        TokenKL(kl.model, ControlSet.from_batches(look), pool=ControlSet.from_batches(seen()[:1]))
    heard = spoken()
    with pytest.raises(ValueError, match="prompt 0 of the pool is prompt 2 of the control set"):
        TokenKL(whisper(), ControlSet.from_batches(heard), pool=ControlSet.from_batches(heard[1:]))


@EVERY
def test_drift_goes_on_after_a_resume(name) -> None:
    """The checkpoint knows the control set by all of its tensors."""
    kind, (model, kl) = KINDS[name], measured(name)
    nudge(model, 0.1)
    kl.anchor()
    file = io.BytesIO()
    torch.save(kl.state_dict(), file)
    file.seek(0)
    resumed = TokenKL(model, ControlSet.from_batches(kind.batches(), SLICES))
    resumed.load_state_dict(torch.load(file))
    resumed.anchor()
    assert resumed.drift() == kl.drift()
    changed = kind.batches()
    name = next((n for n, t in changed[0].items() if t.is_floating_point()), "attention_mask")
    changed[0][name][-1, -1] += 1
    with pytest.raises(ValueError, match="was measured on another control set"):
        TokenKL(model, ControlSet.from_batches(changed, SLICES), noise_floor=False).load_state_dict(kl.state_dict())


def test_another_shift_is_another_control_set() -> None:
    """The same tensors, read at other positions."""
    batches = short([[-100, 1, 2, 3]])
    one, other = (TokenKL(Table(), ControlSet.from_batches(batches, shift=shift)) for shift in (True, False))
    one.anchor()
    with pytest.raises(ValueError, match="was measured on another control set"):
        other.load_state_dict(one.state_dict())


def test_a_training_run_goes_on_bit_for_bit() -> None:
    """Records and weights after a resume are those of the run that was not interrupted."""
    runs = {}
    for stop in (None, 2):
        model = t5()
        optimizer = _optimizer(model)
        for step in range(4):
            if step == stop:
                saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
                model = t5(seed=9)
                model.load_state_dict(saved[0])
                optimizer = _optimizer(model)
                optimizer.load_state_dict(saved[1])
            torch.manual_seed(step)
            model(**translated()[0]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        runs[stop] = (optimizer.last.to_dict() | {"seconds": None}, [p.detach().clone() for p in model.parameters()])
    assert runs[None][0] == runs[2][0]
    assert all(torch.equal(a, b) for a, b in zip(runs[None][1], runs[2][1], strict=True))


def _optimizer(model: nn.Module) -> STEPOptimizer:
    kl = TokenKL(model, ControlSet.from_batches(translated(), SLICES))
    return STEPOptimizer(torch.optim.AdamW(model.parameters(), lr=0.02), kl=kl, budget=Budget(mean=1e-3, drift=0.02))


class Table(Bigram):
    """Every position says what its token says; its name tells nothing."""


@st.composite
def tables(draw: st.DrawFn) -> list[dict[str, Tensor]]:
    """Batches of any shapes, in whose rows any positions but the first are measured."""
    found = []
    for _ in range(draw(st.integers(1, 3))):
        rows, width = draw(st.integers(1, 3)), draw(st.integers(2, 5))
        ids = draw(st.lists(st.integers(0, VOCAB - 1), min_size=rows * width, max_size=rows * width))
        labels = torch.full((rows, width), -100)
        for row in range(rows):
            for place in draw(st.sets(st.integers(1, width - 1), min_size=1)):
                labels[row, place] = draw(st.integers(0, VOCAB - 1))
        found.append({"input_ids": torch.tensor(ids).reshape(rows, width), "labels": labels})
    return found


@settings(max_examples=30, deadline=None)
@given(tables(), st.booleans(), st.data())
def test_any_batches_and_any_part_of_them(batches, shift, data) -> None:
    """Whatever is measured and selected, each example counts once, and each of its positions as the others do."""
    model = Table()
    control = ControlSet.from_batches(batches, shift=shift)
    kept = data.draw(st.lists(st.integers(0, len(control) - 1), min_size=1, unique=True))
    part = control.select(kept)
    closures = [TokenKL(model, each, noise_floor=False) for each in (control, part)]
    for kl in closures:
        kl.anchor()
    before = table_rows(model, batches, shift)
    nudge(model, 0.5)
    after = table_rows(model, batches, shift)
    kls = [reference.prompt_kl(new, old) for new, old in zip(after, before, strict=True)]
    assert closures[0]().prompts == pytest.approx(kls, rel=1e-4, abs=1e-12)
    assert closures[1]().prompts == pytest.approx([kls[i] for i in kept], rel=1e-4, abs=1e-12)
    assert closures[1]().mean == pytest.approx(sum(kls[i] for i in kept) / len(kept), rel=1e-4)


def table_rows(model: Bigram, batches: list[dict[str, Tensor]], shift: bool) -> reference.Policy:
    twin = copy.deepcopy(model).double()
    policy = []
    for batch in batches:
        for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
            places = [t - shift for t, label in enumerate(labels) if label != -100]
            policy.append([twin(torch.tensor([ids[place]])).tolist()[0] for place in places])
    return policy


def test_processes_take_whole_batches(monkeypatch) -> None:
    """Every example is somebody's, with its slices; too few batches are refused."""
    control = ControlSet.from_batches([*translated(), *others(translated())], {"a": [0, 2], "b": [1, 3, 4, 5]})
    monkeypatch.setattr(layouts.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(layouts.dist, "get_world_size", lambda group: 3)
    parts = []
    for rank in range(3):
        monkeypatch.setattr(layouts.dist, "get_rank", lambda group, rank=rank: rank)
        parts.append(Shard.of(control, layouts.ALL, True))
    assert sorted(p.tolist() for part in parts for p in part.control.prompts) == sorted(
        p.tolist() for p in control.prompts
    )
    assert sum(len(part.members["b"]) for part in parts) == 4
    assert [part.idle for part in parts] == [0, 1, 1]
    monkeypatch.setattr(layouts.dist, "get_world_size", lambda group: 5)
    with pytest.raises(ValueError, match="4 batches are too few for 5 processes; give smaller ones"):
        Shard.of(control, layouts.ALL, True)


class Chatty(Bigram):
    """Its forward depends on the other rows of the batch; its head may be run on some rows."""

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embedding(input_ids)
        return self.head(hidden * (1 + 0.5 * len(input_ids)))


def test_a_batch_is_what_the_model_is_called_with() -> None:
    """What it says beside the other rows is what is measured, drawn from a pool or not; rows of a part stay there."""
    model, batches = Chatty(), short([[-100, 1, 2, 3], [-100, 4, 5, 6]])
    pool = [{"input_ids": b["input_ids"] + 9, "labels": b["labels"]} for b in batches]
    control = ControlSet.from_batches(batches, shift=True)
    kl = TokenKL(model, control, pool=ControlSet.from_batches(pool, shift=True))
    kl.anchor()
    assert [kl.penalty(1).item() for _ in range(3)] == pytest.approx([0.0] * 3, abs=1e-10)
    part = TokenKL(model, control.select([1]))
    part.anchor()
    nudge(model, 0.3)
    assert part().mean == pytest.approx(kl().prompts[1], rel=1e-6)


class CutHead(Bigram):
    """Its head has other logits where a batch has several rows."""

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor) -> Tensor:
        logits = self.head(self.embedding(input_ids))
        return logits if len(input_ids) == 1 else logits + logits.mean((0, 1), keepdim=True)


def test_a_short_way_that_fails_on_one_batch_is_taken_on_none() -> None:
    """The readout is compared on every batch."""
    batches = [*short([[-100, 1, 2, 3], [-100, 4, 5, 6]]), *short([[-100, 1, 2, 3]])]
    kl = TokenKL(CutHead(), ControlSet.from_batches(batches, shift=True))
    assert kl.readout == "full"
    assert any("on rows of some batches" in why for why in kl.fallbacks)
