"""What becomes of pi_ref when another control set is bound in the middle of a run."""

import copy
import math
import warnings

import peft
import pytest
import torch
from torch import nn

from step_optim import Budget, ControlSet, PolicyKL, Steer, STEPOptimizer, TokenKL
from tests import reference
from tests.models import tiny_llama

ALL = ControlSet.from_ids([[1, 2], [3, 4, 5], [6], [7, 8]], [[6, 7, 8], [9, 10], [11], [12, 13]], ["a", "a", "b", "b"])
FURTHER = ControlSet.from_ids([[2, 1], [9, 9]], [[3, 4], [5]])


def lora() -> nn.Module:
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=True)
    return peft.get_peft_model(tiny_llama(), config)


pytestmark = pytest.mark.filterwarnings("ignore:held-out prompts")


class Run:
    """A model in training, with its drift by the oracle."""

    def __init__(self, make=tiny_llama, *, budget=None, **options) -> None:
        torch.manual_seed(0)
        self.model = make()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.kl = TokenKL(self.model, ALL, **{"noise_floor": False, **options})
        budget = budget or Budget(mean=math.inf)
        self.optimizer = STEPOptimizer(torch.optim.AdamW(trained, lr=0.01), kl=self.kl, budget=budget)
        self.start = copy.deepcopy(self.model)

    def steps(self, count: int = 2):
        for _ in range(count):
            ids = torch.randint(1, 20, (2, 6))
            self.model(input_ids=ids, labels=ids).loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self.optimizer.last

    def drift(self, control: ControlSet, start: nn.Module | None = None) -> float:
        policies = (reference.policy_of(model, control) for model in (self.model, start or self.start))
        return reference.movement(*policies, {}).mean


@pytest.mark.parametrize("make", [tiny_llama, lora])
@pytest.mark.parametrize("chosen", [[0, 3], [2], [3, 1, 0]])
def test_keep_takes_the_prompts_that_the_run_knows(make, chosen) -> None:
    """Some of the control set: drift is still from where training began."""
    run, fewer = Run(make), ALL.select(chosen)
    run.steps()
    run.optimizer.bind(TokenKL(run.model, fewer, noise_floor=False), origin="keep")
    assert run.steps().reference_drift.mean == reference.near(run.drift(fewer), 1e-3)


def test_keep_finds_prompts_of_the_pool_and_the_held_out_set() -> None:
    """And what is bound may have a pool of its own, if that is known, too."""
    run = Run(pool=FURTHER.select([0]), held_out=FURTHER.select([1]))
    run.steps()
    kl = TokenKL(run.model, FURTHER, noise_floor=False, pool=ALL.select([1]))
    run.optimizer.bind(kl, origin="keep")
    assert run.steps().reference_drift.mean == reference.near(run.drift(FURTHER), 1e-3)
    kl.pool.anchor()
    assert kl.pool.drift().mean == reference.near(run.drift(ALL.select([1])), 1e-3)


def test_keep_refuses_what_nobody_knows() -> None:
    """With the remedies; the run goes on as before."""
    run = Run()
    run.steps()
    with pytest.raises(ValueError, match="origin='keep': nothing knows what pi_ref said on all of these"):
        run.optimizer.bind(TokenKL(run.model, FURTHER, noise_floor=False), origin="keep")
    other = TokenKL(run.model, ALL.select([0]), noise_floor=False, pool=FURTHER)
    with pytest.raises(ValueError, match="nothing knows"):
        run.optimizer.bind(other, origin="keep")
    assert run.steps().reference_drift.mean == reference.near(run.drift(ALL), 1e-3)


def test_keep_leaves_a_pi_ref_that_the_closure_brings_along() -> None:
    run = Run()
    later = TokenKL(run.model, FURTHER, noise_floor=False)
    later.anchor()
    run.steps()
    run.optimizer.bind(later, origin="keep")
    assert run.steps().reference_drift.mean == reference.near(run.drift(FURTHER), 1e-3)


def test_keep_prefers_what_the_run_knows() -> None:
    """A closure that was used for one step has the policy of that day as pi_ref."""
    run, fewer = Run(), ALL.select([0, 3])
    run.steps()
    kl = TokenKL(run.model, fewer, noise_floor=False)
    kl.anchor()
    run.steps()
    run.optimizer.bind(kl, origin="keep")
    assert run.steps().reference_drift.mean == reference.near(run.drift(fewer), 1e-3)


@pytest.mark.parametrize("noise_floor", [True, False])
@pytest.mark.parametrize("keep", [True, False])
def test_a_head_that_is_trained_later_moves_no_pi_ref(keep, noise_floor) -> None:
    """Of the control set, the pool and the held-out set; also if another closure took them over."""
    options = {"pool": FURTHER.select([0]), "held_out": FURTHER.select([1]), "every": 4, "noise_floor": noise_floor}
    run = Run(**options)
    head = run.model.get_output_embeddings().weight
    head.requires_grad_(False)
    run.steps()
    if keep:
        run.optimizer.bind(TokenKL(run.model, ALL, **options), origin="keep")
    else:
        state = copy.deepcopy(run.optimizer.state_dict())
        run.optimizer.bind(TokenKL(run.model, ALL, **options), origin="now")
        run.optimizer.load_state_dict(state)
    head.requires_grad_(True)
    last = run.steps(6)
    kl = run.optimizer._run.kl
    assert last.reference_drift.mean == reference.near(run.drift(ALL), 1e-3)
    assert last.held_out_drift.mean == reference.near(run.drift(FURTHER.select([1])), 1e-3)
    kl.pool.anchor()
    assert kl.pool.drift().mean == reference.near(run.drift(FURTHER.select([0])), 1e-3)


@pytest.mark.parametrize("origin", ["now", "adapter_off"])
def test_a_resumed_run_may_go_on_with_other_prompts(origin) -> None:
    """Pi_ref of the checkpoint is not needed then."""
    run = Run(lora)
    run.steps()
    state = run.optimizer.state_dict()
    trained = [p for p in run.model.parameters() if p.requires_grad]
    optimizer = STEPOptimizer(torch.optim.AdamW(trained, lr=0.01), budget=Budget(mean=math.inf))
    optimizer.load_state_dict(state)
    optimizer.bind(TokenKL(run.model, FURTHER, noise_floor=False), origin=origin)
    run.optimizer = optimizer
    assert run.steps(1).reference_drift is not None


def test_a_new_pi_ref_drops_what_steer_remembers_of_the_old_one() -> None:
    """Its directions are of the drift from there."""
    run = Run(lora, budget=Budget(drift=1e-4), pool=FURTHER)
    run.optimizer.controller = Steer()
    run.steps(3)
    assert run.optimizer._run.memory["cuts"]
    run.optimizer.bind(run.kl, origin="now")
    assert not run.optimizer._run.memory.get("cuts")


def test_adapter_off_is_the_base_model() -> None:
    """On new prompts, and their pool; what is trained stays so, to the flag."""
    run = Run(lora)
    frozen = next(p for name, p in run.model.named_parameters() if "lora_A" in name)
    frozen.requires_grad_(False)
    run.steps()
    flags = [p.requires_grad for p in run.model.parameters()]
    kl = TokenKL(run.model, FURTHER, noise_floor=False, held_out=ALL, every=1)
    run.optimizer.bind(kl, origin="adapter_off")
    assert [p.requires_grad for p in run.model.parameters()] == flags
    last = run.steps()
    with run.start.disable_adapter():
        assert last.reference_drift.mean == reference.near(run.drift(FURTHER), 1e-3)
        assert last.held_out_drift.mean == reference.near(run.drift(ALL), 1e-3)


def test_adapter_off_needs_an_adapter() -> None:
    run = Run()
    with pytest.raises(ValueError, match="origin='adapter_off': no module of the KL closure is a PEFT model"):
        run.optimizer.bind(TokenKL(run.model, FURTHER, noise_floor=False), origin="adapter_off")


def test_now_begins_anew() -> None:
    """Also of a closure that has a pi_ref, and without the warning that a cap begins anew."""
    run = Run(budget=Budget(drift=10.0))
    run.steps()
    start = copy.deepcopy(run.model)
    later = TokenKL(run.model, FURTHER, noise_floor=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.optimizer.bind(later, origin="now")
        run.optimizer.bind(run.kl, origin="now")
        run.optimizer.bind(later, origin="now")
    assert run.steps().reference_drift.mean == reference.near(run.drift(FURTHER, start), 1e-3)
    start = copy.deepcopy(run.model)
    run.optimizer.bind(later, origin="now")  # it has a pi_ref by now
    assert run.steps().reference_drift.mean == reference.near(run.drift(FURTHER, start), 1e-3)


def test_without_a_word_a_cap_that_begins_anew_is_told_of() -> None:
    run = Run(budget=Budget(drift=10.0))
    run.steps()
    with pytest.warns(UserWarning, match=r"Say what is meant, bind\(kl, origin='keep'\), 'adapter_off' or 'now'"):
        run.optimizer.bind(TokenKL(run.model, FURTHER, noise_floor=False))


def test_bad_input() -> None:
    run = Run()
    with pytest.raises(ValueError, match="origin='start' is unknown; use 'keep', 'adapter_off', 'now' or None"):
        run.optimizer.bind(run.kl, origin="start")
    with pytest.raises(ValueError, match="origin='now' is about pi_ref, and FunctionKL"):
        run.optimizer.bind(lambda: 0.0, origin="now")
    layer = nn.Linear(2, 3)
    kl = PolicyKL(lambda: layer(torch.eye(2)), noise_floor=False)
    optimizer = STEPOptimizer(torch.optim.SGD(layer.parameters(), lr=0.1), kl=kl, budget=Budget(mean=0.1))
    with pytest.raises(ValueError, match="origin='keep'"):
        optimizer.bind(PolicyKL(lambda: layer(torch.ones(1, 2)), noise_floor=False), origin="keep")
