"""TokenKL: the movement of a causal language model, through every readout, against a float64 oracle."""

import copy
import io
import math

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from step_optim import Budget, ControlSet, Gate, Interpolate, Movement, STEPOptimizer, TokenKL
from step_optim.host.rng import RNGState
from step_optim.snapshot.tensors import same_bits
from tests import reference
from tests.models import (
    VOCAB,
    Bigram,
    control_sets,
    nudge,
    ragged_control,
    tiny_cohere,
    tiny_gemma2,
    tiny_gpt2,
    tiny_llama,
    tiny_qwen,
)


def frozen_head_llama(seed: int = 0, dtype: torch.dtype = torch.float32):
    """Llama whose head and embeddings do not train, as under LoRA."""
    model = tiny_llama(seed=seed, dtype=dtype)
    for module in (model.lm_head, model.model.embed_tokens):
        module.requires_grad_(False)
    return model


def lora_llama(seed: int = 0, targets=("q_proj", "v_proj", "down_proj"), **options):
    """Llama with LoRA adapters that have moved a little from zero."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=2, target_modules=list(targets), lora_dropout=0.2, **options)
        model = peft.get_peft_model(tiny_llama(seed=seed), config)
    nudge(model, 0.2, seed=seed + 5)
    return model


def lora_head(seed: int = 0):
    """LoRA on the head too."""
    return lora_llama(seed, targets=("q_proj", "lm_head"))


def saved_head(seed: int = 0):
    """The head trained in full next to adapters (modules_to_save)."""
    return lora_llama(seed, modules_to_save=["lm_head"])


class BiasedHead(nn.Module):
    """A model of the Hugging Face interface whose plain head has a bias."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embedding, self.body = nn.Embedding(VOCAB, 8), nn.Linear(8, 8)
            self.head = nn.Linear(8, VOCAB)

    def get_output_embeddings(self) -> nn.Module:
        """Return the head."""
        return self.head

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits as a bare tensor."""
        return self.head(torch.tanh(self.body(self.embedding(input_ids))))


class Wrapper(nn.Module):
    """Hides the accessors of the model inside it, as DistributedDataParallel does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        """Pass on."""
        return self.module(*args, **kwargs)


MODELS = {
    "llama": (tiny_llama, "hidden"),
    "llama, frozen head": (frozen_head_llama, "hidden"),
    "llama, tied": (lambda seed=0: tiny_llama(seed=seed, tied=True), "hidden"),
    "qwen2": (tiny_qwen, "hidden"),
    "gpt2": (tiny_gpt2, "hidden"),
    "biased head": (BiasedHead, "hidden"),
    "lora": (lora_llama, "hidden"),
    "wrapped": (lambda seed=0: Wrapper(tiny_llama(seed=seed)), "hidden"),
    "gemma2": (tiny_gemma2, "rows"),
    "cohere": (tiny_cohere, "rows"),
    "lora on the head": (lora_head, "rows"),
    "head in modules_to_save": (saved_head, "rows"),
    "bigram": (lambda seed=0: Bigram(seed=seed), "full"),
}
EVERY = pytest.mark.parametrize("name", MODELS)
READOUTS = {"hidden": "llama", "trained hidden": "gpt2", "rows": "gemma2", "full": "bigram"}
ONE_EACH = pytest.mark.parametrize("name", ["llama", "llama, frozen head", "gemma2", "bigram"])


def build(name: str, seed: int = 0) -> nn.Module:
    """One of the models above, in train mode, as a training loop has it."""
    return MODELS[name][0](seed=seed).train()


def expected(model: nn.Module, previous: reference.Policy, control: ControlSet) -> Movement:
    """The oracle."""
    return reference.movement(reference.policy_of(model, control), previous, control.slices)


def close(measured: Movement, wanted: Movement, rel: float) -> None:
    """All figures agree, slice by slice, tails too, to ``rel`` and what float32 logits allow."""
    assert measured.slices.keys() == wanted.slices.keys()
    assert measured.mean == reference.near(wanted.mean, rel)
    for name, kl in wanted.slices.items():
        assert measured.slices[name] == reference.near(kl, rel)
    assert measured.prompt == reference.near(wanted.prompt, rel)
    assert measured.token == reference.near(wanted.token, rel)


class Counter:
    """Counts a module's forwards and remembers the shapes of what it returned."""

    def __init__(self, module: nn.Module) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.hook = module.register_forward_hook(self.note)

    def note(self, _module: nn.Module, _inputs: object, out: object) -> None:
        """Remember one."""
        self.shapes.append(tuple(getattr(out, "logits", out).shape))

    def taken(self) -> list[tuple[int, ...]]:
        """What came since the last look."""
        shapes, self.shapes = self.shapes, []
        return shapes


@EVERY
def test_readout_is_recognised(name) -> None:
    """Plain heads are read through hidden states, anything else through its logits on response rows if possible."""
    assert TokenKL(build(name), ragged_control()).readout == MODELS[name][1]


@pytest.mark.parametrize("name", ["gemma2", "cohere"])
def test_readout_is_recognised_where_a_batch_says_nothing(name) -> None:
    """A batch of padding tokens, whose embedding and logits are zero, does not make a capped or scaled head plain."""
    model = build(name)
    with torch.no_grad():
        model.model.embed_tokens.weight[0] = 0
    control = ControlSet.from_ids([[0, 0, 0], [5, 6], [0]], [[0], [7], [0]])  # the longest and the shortest
    previous = reference.policy_of(model, control)
    kl = TokenKL(model, control, micro_batch=1)
    kl.anchor()
    nudge(model, 0.1)
    close(kl(), expected(model, previous, control), rel=2e-3)


@EVERY
@settings(max_examples=4)
@given(control=control_sets(), seed=st.integers(0, 99), size=st.sampled_from([0.01, 0.1, 0.5]), batch=st.integers(1, 5))
def test_movement_equals_the_oracle(name, control, seed, size, batch) -> None:
    """Every readout equals the paper's sums over a float64, unpadded, one-by-one evaluation."""
    model = build(name, seed)
    previous = reference.policy_of(model, control)
    kl = TokenKL(model, control, micro_batch=batch)
    kl.anchor()
    nudge(model, size, seed)
    close(kl(), expected(model, previous, control), rel=2e-3)


@EVERY
def test_movement_of_1e_minus_8_is_right_to_rounding(name) -> None:
    """In float32 a movement as small as 1e-8 is still a figure, to some 1e-3 of itself, through every readout."""
    control = ragged_control()
    for seed in range(3):
        model = build(name, seed)
        previous = reference.policy_of(model, control)
        kl = TokenKL(model, control)
        kl.anchor()
        nudge(model, 0.05, seed)
        probe = kl().mean
        model = build(name, seed)
        kl = TokenKL(model, control)
        kl.anchor()
        nudge(model, 0.05 * math.sqrt(1e-8 / probe), seed)
        wanted = expected(model, previous, control)
        assert 0.3e-8 < wanted.mean < 3e-8
        close(kl(), wanted, rel=1e-5)


@EVERY
def test_zero_movement_is_exactly_zero(name) -> None:
    """Unmoved weights read 0.0 in train mode, dropout and all; so do moved weights that came back."""
    control, model = ragged_control(), build(name)
    kl = TokenKL(model, control, micro_batch=2)
    kl.anchor()
    assert kl() == Movement(0.0, {"early": 0.0, "late": 0.0})
    before = copy.deepcopy(model.state_dict())
    nudge(model, 0.1)
    assert kl().mean > 0
    model.load_state_dict(before)
    assert kl() == Movement(0.0, {"early": 0.0, "late": 0.0})


@given(control=control_sets(max_prompts=6), seed=st.integers(0, 99), data=st.data())
def test_order_and_batching_do_not_matter(control, seed, data) -> None:
    """Any order of the prompts and any micro-batch, hence any padding, gives the same figures."""
    order = data.draw(st.permutations(range(len(control))))
    shuffled = control.select(order)
    figures = []
    for which, batch in ((control, 1), (control, 4), (shuffled, 3), (control, 100)):
        model = tiny_llama(seed=seed)
        kl = TokenKL(model, which, micro_batch=batch)
        kl.anchor()
        nudge(model, 0.1, seed)
        figures.append(kl())
    for moved in figures[1:]:
        close(moved, figures[0], rel=1e-4)


@given(tokens=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12), seed=st.integers(0, 99))
def test_longer_neighbours_change_nothing(tokens, seed) -> None:
    """A prompt reads the same KL alone as next to a longer one that it is padded to."""
    short = ([3, 4], [5, 6, 7])
    model = tiny_gpt2(seed=seed)
    alone = TokenKL(model, ControlSet.from_ids([short[0]], [short[1]], {"short": [0]}))
    both = TokenKL(model, ControlSet.from_ids([short[0], [1, 2, 3, 4]], [short[1], tokens], {"short": [0]}))
    alone.anchor()
    both.anchor()
    nudge(model, 0.1, seed)
    assert both().slices["short"] == pytest.approx(alone().mean, rel=1e-4)


def test_response_tokens_after_the_last_and_prompt_tokens_do_not_count() -> None:
    """Exactly the T_x positions that predict response tokens count: not the prompt's own, not the one after the end."""
    model = Bigram()
    control = ControlSet.from_ids([[10, 11]], [[12, 13]])  # rows are predicted from 11 and 12
    kl = TokenKL(model, control)
    kl.anchor()
    with torch.no_grad():
        model.embedding.weight[10] += 1
        model.embedding.weight[13] += 1
    assert kl().mean == 0.0
    with torch.no_grad():
        model.embedding.weight[12] += 1
    moved = kl().mean
    assert moved > 0
    z = model.head(model.embedding.weight[12]), model.head(model.embedding.weight[12] - 1)
    assert moved == pytest.approx(reference.row_kl(z[0].tolist(), z[1].tolist()) / 2, rel=1e-4)


def test_never_weighted_by_length() -> None:
    """A one-token response weighs as much as one of twelve tokens: the token-weighted mean is far off."""
    model, control = Bigram(), ControlSet.from_ids([[10], [20]], [[11], [21] * 12])
    previous = reference.policy_of(model, control)
    kl = TokenKL(model, control)
    kl.anchor()
    with torch.no_grad():
        model.embedding.weight[10] += 1
    candidate = reference.policy_of(model, control)
    wrong = reference.token_weighted(candidate, previous)
    right = reference.movement(candidate, previous, {}).mean
    assert kl().mean == pytest.approx(right, rel=1e-4)
    assert right == pytest.approx(6.5 * wrong)


@EVERY
def test_one_forward_a_committed_step(name) -> None:
    """The first step anchors and audits; every later committed step costs one forward over the control set."""
    model = build(name)
    optimizer = STEPOptimizer(
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4),
        kl=TokenKL(model, ragged_control()),
        budget=Budget(mean=math.inf, reference=1e9),
    )
    counter = Counter(model)
    forwards = []
    for _ in range(4):
        for p in model.parameters():
            p.grad = torch.ones_like(p) if p.requires_grad else None
        optimizer.step()
        assert optimizer.last.action == "commit"
        assert optimizer.last.candidate.mean > 0
        forwards.append(len(counter.taken()))
    assert forwards == [2, 1, 1, 1]


def test_a_rejected_step_needs_no_new_reference() -> None:
    """After a rejection the old reference still stands: one forward for the next candidate."""
    model = build("llama")
    optimizer = STEPOptimizer(
        torch.optim.SGD(model.parameters(), lr=10.0),
        kl=TokenKL(model, ragged_control()),
        budget=1e-9,
        controller=Gate(),
    )
    counter, forwards = Counter(model), []
    for seed in range(3):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
        optimizer.step()
        assert optimizer.last.action == "reject"
        forwards.append(len(counter.taken()))
    assert forwards == [2, 1, 1]


@pytest.mark.parametrize("name", [name for name, (_, readout) in MODELS.items() if readout != "full"])
def test_the_head_runs_on_response_rows_only(name) -> None:
    """No [B, T, V] leaves the head during an audit: one row with hidden states, the response rows otherwise."""
    model, control = build(name), ragged_control()
    kl = TokenKL(model, control, micro_batch=2)
    plain = model.module if isinstance(model, Wrapper) else model
    counter = Counter(plain.get_output_embeddings())
    kl.anchor()
    kl()
    shapes = counter.taken()
    assert len(shapes) == 4
    rows = [math.prod(shape[:-1]) for shape in shapes]
    if kl.readout == "hidden":
        assert rows == [1] * 4
    else:
        assert sum(rows) == 2 * control.response_tokens


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_the_hooks_are_gone_afterwards(name) -> None:
    """An audit leaves the model's own forward as it was: all positions, same logits, no hook."""
    model, control = build(name).eval(), ragged_control()
    ids = torch.tensor([[3, 4, 5, 6]])
    before = model(ids).logits
    kl = TokenKL(model, control)
    kl.anchor()
    kl()
    assert torch.equal(model(ids).logits, before)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


class Noisy(nn.Module):
    """Everything that an audit could disturb: dropout, BatchNorm, a forward that draws and counts."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.table = Bigram()
            self.norm, self.drop = nn.BatchNorm1d(VOCAB), nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits, with side effects."""
        self.calls += 1
        torch.rand(3)
        logits = self.drop(self.table(input_ids))
        return self.norm(logits.flatten(0, 1)).view_as(logits)


def test_an_audit_leaves_no_trace() -> None:
    """Training flags (mixed ones too), buffers, random streams and gradients are bitwise those before."""
    model = Noisy().train()
    model.table.head.eval()
    model(torch.tensor([[1, 2, 3]])).sum().backward()
    flags = [module.training for module in model.modules()]
    buffers = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    stream = RNGState.capture()
    kl = TokenKL(model, ragged_control())
    kl.anchor()
    assert kl().mean == 0.0
    kl.drift()
    assert [module.training for module in model.modules()] == flags
    for name, buffer in model.named_buffers():
        assert buffer is buffers[name][0]
        assert same_bits(buffer, buffers[name][1])
    for name, grad in grads.items():
        assert same_bits(model.get_parameter(name).grad, grad)
    after = RNGState.capture()
    assert same_bits(after.torch_cpu, stream.torch_cpu)
    assert after.python == stream.python
    assert after.numpy[2:] == stream.numpy[2:]


def test_an_audit_that_fails_leaves_no_trace_either() -> None:
    """If the forward raises in the middle, flags and buffers are put back and no hook stays."""
    model, control = tiny_gpt2().train(), ragged_control()
    kl = TokenKL(model, control)
    kl.anchor()
    failing = model.transformer.ln_f.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        kl()
    failing.remove()
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert kl().mean == 0.0


@ONE_EACH
@settings(max_examples=5)
@given(sizes=st.lists(st.sampled_from([0.02, 0.1, 0.3]), min_size=1, max_size=3), seed=st.integers(0, 99))
def test_promotion_and_drift(name, sizes, seed) -> None:
    """A promoted audit is the next reference, and drift is the movement from the very first one."""
    control, model = ragged_control(), build(name, seed)
    kl = TokenKL(model, control)
    kl.anchor()
    first = here = reference.policy_of(model, control)
    for turn, size in enumerate(sizes):
        nudge(model, size, seed + turn)
        there = reference.policy_of(model, control)
        audit = kl.audit()
        close(audit.movement, reference.movement(there, here, control.slices), rel=2e-3)
        close(kl.drift(audit), reference.movement(there, first, control.slices), rel=2e-3)
        close(kl.drift(), reference.movement(here, first, control.slices), rel=2e-3)
        kl.anchor(audit)
        assert kl().mean == 0.0
        here = there
    close(kl.drift(), reference.movement(here, first, control.slices), rel=2e-3)


@ONE_EACH
def test_a_reference_does_not_move_with_the_weights(name) -> None:
    """The reference is a copy: training on, head and all, does not reach it, nor the audit that will be promoted."""
    control, model = ragged_control(), build(name)
    kl = TokenKL(model, control)
    kl.anchor()
    nudge(model, 0.1, 1)
    audit, here = kl.audit(), reference.policy_of(model, control)
    nudge(model, 0.1, 2)
    kl.anchor(audit)
    close(kl(), expected(model, here, control), rel=2e-3)


def test_a_head_that_is_unfrozen_later() -> None:
    """Gradual unfreezing: the head's first trained step is measured in full."""
    control, model = ragged_control(), build("llama, frozen head")
    optimizer = STEPOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), kl=TokenKL(model, control), budget=math.inf)
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e-3) if p.requires_grad else None
    optimizer.step()
    previous = reference.policy_of(model, control)
    model.lm_head.requires_grad_(True)
    for p in model.parameters():
        p.grad = None
    model.lm_head.weight.grad = torch.randn(model.lm_head.weight.shape, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    close(optimizer.last.accepted, expected(model, previous, control), rel=2e-3)


def test_drift_from_before_a_head_was_unfrozen() -> None:
    """Gradual unfreezing: pi_ref keeps the head that it had when the last step began."""
    control, model = ragged_control(), build("llama, frozen head")
    kl = TokenKL(model, control)
    kl.anchor()
    first = reference.policy_of(model, control)
    model.lm_head.requires_grad_(True)
    kl.anchor()  # as the optimizer does before the step, since requires_grad is in the fingerprint
    nudge(model, 0.2)
    kl.anchor()
    close(kl.drift(), expected(model, first, control), rel=2e-3)


@EVERY
def test_state_dict_keeps_pi_ref(name) -> None:
    """A resumed run goes on measuring drift from the start of training: through a file, bit for bit."""
    control, model = ragged_control(), build(name)
    kl = TokenKL(model, control)
    kl.anchor()
    nudge(model, 0.1)
    kl.anchor(kl.audit())
    drift = kl.drift()
    assert drift.mean > 0
    file = io.BytesIO()
    torch.save(kl.state_dict(), file)
    file.seek(0)
    resumed = TokenKL(model, control)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    resumed.anchor()
    assert resumed.drift() == drift
    resumed_again = TokenKL(model, control)
    resumed_again.load_state_dict(resumed.state_dict())
    resumed_again.anchor()
    assert resumed_again.drift() == drift


def test_state_of_a_closure_without_a_reference_is_empty() -> None:
    """Before the first anchor there is nothing to keep, and loading nothing changes nothing."""
    model = build("llama")
    kl = TokenKL(model, ragged_control())
    assert kl.state_dict() == {}
    kl.load_state_dict({})
    kl.anchor()
    assert kl.drift().mean == 0.0


def test_state_of_another_control_set_is_refused() -> None:
    """A pi_ref that was measured on other responses is an error that says what to resume with."""
    model, control = build("llama"), ragged_control()
    kl = TokenKL(model, control)
    kl.anchor()
    other = TokenKL(model, control.select([0, 1]))
    with pytest.raises(ValueError, match=r"pi_ref.*resume with the"):
        other.load_state_dict(kl.state_dict())


def test_saved_state_does_not_follow_training() -> None:
    """A state dict that was taken before further training keeps its values."""
    model = build("gpt2")
    kl = TokenKL(model, ragged_control())
    kl.anchor()
    state = kl.state_dict()
    kept = copy.deepcopy(state)
    nudge(model, 0.5)
    kl.anchor(kl.audit())
    for name, value in kept.items():
        assert torch.equal(value, state[name]) if isinstance(value, Tensor) else value == state[name]


@ONE_EACH
def test_fingerprint_sees_every_edit(name) -> None:
    """An in-place edit of any parameter or buffer changes the fingerprint; an audit does not."""
    model = build(name)
    model.register_buffer("extra", torch.zeros(2))
    kl = TokenKL(model, ragged_control())
    kl.anchor()
    known = kl.fingerprint()
    kl()
    kl.drift()
    assert kl.fingerprint() == known
    for tensor in (*model.parameters(), *model.buffers()):
        with torch.no_grad():
            tensor.add_(0)
        assert kl.fingerprint() != known
        known = kl.fingerprint()


def test_an_edit_of_a_frozen_weight_is_not_charged_to_the_step() -> None:
    """After an outside edit of a weight that the optimizer does not own, the reference is taken anew."""
    control, model = ragged_control(), build("llama, frozen head")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = STEPOptimizer(torch.optim.SGD(trained, lr=1e-3), kl=TokenKL(model, control), budget=math.inf)
    for edit in (False, True):
        if edit:
            with torch.no_grad():
                model.lm_head.weight.mul_(1.5)
        previous = reference.policy_of(model, control)
        for p in trained:
            p.grad = torch.ones_like(p)
        optimizer.step()
        close(optimizer.last.accepted, expected(model, previous, control), rel=2e-3)


def test_lora_through_the_optimizer() -> None:
    """PEFT end to end: figures of a shrunk step equal the oracle, and only adapters moved."""
    control, model = ragged_control(), build("lora")
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    previous = reference.policy_of(model, control)
    optimizer = STEPOptimizer(
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.2),
        kl=TokenKL(model, control),
        budget=Budget(mean=1e-4, slices={"late": 0.8e-4}),
    )
    for i, p in enumerate(optimizer.param_groups[0]["params"]):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    optimizer.step()
    assert optimizer.last.action == "shrink"
    wanted = expected(model, previous, control)
    close(optimizer.last.accepted, wanted, rel=2e-3)
    assert reference.within(wanted, 1.001e-4, {"late": 0.801e-4})
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)


@pytest.mark.parametrize(
    "dtype",
    [
        torch.bfloat16,
        torch.float16,
    ],
)
def test_low_precision_models(dtype) -> None:
    """A bf16 or fp16 body is audited as it is: exactly 0 unmoved, and near the oracle for a large movement."""
    control, model = ragged_control(), tiny_llama(dtype=dtype)
    previous = reference.policy_of(model, control)
    kl = TokenKL(model, control)
    assert kl.readout == "hidden"
    kl.anchor()
    assert kl().mean == 0.0
    nudge(model, 0.5)
    close(kl(), expected(model, previous, control), rel=0.1)


def test_extreme_logits() -> None:
    """A model with logits in the thousands moves by a large finite KL, equal to the oracle."""
    control, model = ragged_control(), build("bigram")
    with torch.no_grad():
        model.head.weight.mul_(2000)
    previous = reference.policy_of(model, control)
    kl = TokenKL(model, control)
    kl.anchor()
    assert kl().mean == 0.0
    nudge(model, 0.5)
    moved = kl()
    assert moved.mean > 100
    close(moved, expected(model, previous, control), rel=1e-3)


@ONE_EACH
def test_broken_weights_read_nan(name) -> None:
    """NaN weights give NaN figures, which no budget accepts, and do not spoil the reference."""
    control, model = ragged_control(), build(name)
    kl = TokenKL(model, control)
    kl.anchor()
    weight = next(p for p in model.parameters() if p.requires_grad)
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(math.nan)
    moved = kl()
    assert math.isnan(moved.mean)
    assert not Budget(mean=math.inf).at(0).judge(moved).feasible
    with torch.no_grad():
        weight.copy_(kept)
    assert kl().mean == 0.0


def test_masked_vocabulary() -> None:
    """A model that masks tokens with -inf is read through its own logits: finite, right, and 0 unmoved."""

    class Masked(Bigram):
        def forward(self, input_ids: Tensor) -> Tensor:
            logits = super().forward(input_ids)
            return logits.masked_fill(torch.arange(VOCAB) >= 50, -math.inf)

    control, model = ragged_control(), Masked()
    previous = reference.policy_of(model, control)
    kl = TokenKL(model, control)
    kl.anchor()
    assert kl().mean == 0.0
    nudge(model, 0.3)
    close(kl(), expected(model, previous, control), rel=1e-3)


def test_a_model_whose_head_output_is_reshaped_falls_back() -> None:
    """A model that indexes its head's output by position cannot be cut to rows: its full logits are read."""

    class Reorders(BiasedHead):
        def forward(self, input_ids: Tensor) -> Tensor:
            logits = super().forward(input_ids)
            return logits[:, torch.arange(input_ids.shape[1])] + 0.1 * logits[:, :1]

    control, model = ragged_control(), Reorders()
    previous = reference.policy_of(model, control)
    kl = TokenKL(model, control)
    assert kl.readout == "full"
    kl.anchor()
    nudge(model, 0.1)
    close(kl(), expected(model, previous, control), rel=1e-3)


def test_movement_before_a_reference_is_an_error() -> None:
    """An audit without a reference says what to do."""
    kl = TokenKL(build("bigram"), ragged_control())
    with pytest.raises(RuntimeError, match="TokenKL has no reference yet; call anchor"):
        kl()


def test_autocast_around_the_step_does_not_reach_the_audit() -> None:
    """Inside a bf16 autocast region a float32 model is still audited in float32."""
    control, model = ragged_control(), build("llama")
    kl = TokenKL(model, control)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kl.anchor()
        assert kl().mean == 0.0
        previous = kl.audit().policy.x
        nudge(model, 1e-4)
        inside = kl().mean
    assert previous.dtype == torch.float32
    assert kl().mean == pytest.approx(inside, rel=1e-12)


def test_interpolation_costs_one_forward_a_trial() -> None:
    """A shrunk step costs the candidate's audit and one forward for each trial, no more."""
    model = build("llama")
    optimizer = STEPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.02),
        kl=TokenKL(model, ragged_control()),
        budget=1e-4,
        controller=Interpolate(search="bisect"),
    )
    counter = Counter(model)
    for seed in range(2):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
        optimizer.step()
        assert optimizer.last.action == "shrink"
        assert len(counter.taken()) == (seed == 0) + 1 + len(optimizer.last.trials)
