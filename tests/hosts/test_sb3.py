"""stable-baselines3 and sb3-contrib themselves: each update is one audited candidate, and nothing else changes."""

from __future__ import annotations

import copy
import json
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sb3_contrib import RecurrentPPO
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.callbacks import CheckpointCallback, EvalCallback
from stable_baselines3.common.distributions import CategoricalDistribution, StateDependentNoiseDistribution
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.utils import set_random_seed
from torch.distributions import Independent, MixtureSameFamily, Normal

from step_optim import Action, Budget, Gate, Ledger, PolicyKL, Project, read_log
from step_optim.hosts.rollouts import drawn, policy_of, torch_distribution
from step_optim.hosts.sb3 import STEPCallback
from step_optim.snapshot.tensors import same_bits
from tests import reference
from tests.hosts.sb3_models import CASES, Case, Seen, observed
from tests.strategies import bits

EVERY = pytest.mark.parametrize("name", CASES)
ALL = 10**6
"""More observations than any rollout has."""

STEPS = 96

RESUMED = ["ppo, box", "ppo, squashed gsde", "a2c, discrete", "recurrent, dict", "maskable, dict"]


class Kept(KVWriter):
    """Keeps what a logger writes, but times."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def write(self, key_values: Any, key_excluded: Any, step: int = 0) -> None:
        self.rows.append({k: v for k, v in key_values.items() if not k.startswith(("time/fps", "time/time_elapsed"))})

    def close(self) -> None:
        """Nothing is open."""


def watched(model: Any) -> list[dict[str, Any]]:
    """Give a model a logger, and return its rows."""
    kept = Kept()
    model.set_logger(Logger(None, [kept]))
    return kept.rows


def state(model: Any) -> Any:
    """All that training has left: weights, buffers, the optimizer's state, and the random streams."""
    inner = getattr(model.policy.optimizer, "optimizer", model.policy.optimizer)
    streams = [random.getstate(), np.random.get_state(), torch.get_rng_state()]
    return copy.deepcopy([model.policy.state_dict(), inner.state_dict(), streams])


def equal(a: Any, b: Any) -> bool:
    """Bit for bit."""
    if isinstance(a, torch.Tensor):
        return same_bits(a, b)
    if isinstance(a, np.ndarray):
        return bool((a == b).all())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


@EVERY
def test_an_infinite_budget_changes_nothing(name) -> None:
    """Weights, optimizer, logged figures and random streams are those of the bare run, bit for bit."""
    bare = CASES[name].model()
    rows = watched(bare)
    bare.learn(STEPS, log_interval=1)
    wanted = state(bare)
    wrapped = CASES[name].model()
    own_rows = watched(wrapped)
    step = STEPCallback(budget=float("inf"))
    wrapped.learn(STEPS, log_interval=1, callback=step)
    assert equal(state(wrapped), wanted)
    assert [{k: v for k, v in row.items() if not k.startswith("step_optim/")} for row in own_rows] == [
        {k: v if v == v else pytest.approx(v, nan_ok=True) for k, v in row.items()} for row in rows
    ]
    assert any("step_optim/max_accepted_kl" in row for row in own_rows)
    assert step.optimizer.summary()["steps"] == len(rows)


@EVERY
@pytest.mark.parametrize("budget", [1e-3, 1e-4])
def test_every_update_is_within_the_budget(name, budget) -> None:
    """By an observer in float64 that reads the whole rollout, and the policy before and after ``train()``."""
    model = CASES[name].model()
    records: list[dict[str, Any]] = []
    step = STEPCallback(budget=budget, observations=ALL, log=lambda record, index: records.append(record))
    with observed(model) as seen:
        model.learn(STEPS, callback=step)
    records = [record for record in records if "action" in record]
    assert len(seen) == len(records) > 0
    assert {record["action"] for record in records} >= {"shrink"}
    for update, record in zip(seen, records, strict=True):
        assert update.kl <= budget * (1 + 1e-3)
        if record["action"] != "reject":
            assert record["accepted"]["mean"] == reference.near(update.kl, rel=1e-3)


def test_what_is_drawn_is_a_part_of_the_rollout() -> None:
    """As many observations as asked for, others in every update, the same for one seed; a sequence is whole."""
    model = CASES["maskable, discrete"].model()
    model.learn(32)
    buffer = model.rollout_buffer
    buffer.generator_ready, late = False, copy.deepcopy(buffer)
    for name in ("observations", "action_masks"):  # as [T, envs, ...] again
        shaped = getattr(buffer, name).reshape(2, 16, -1).swapaxes(0, 1)
        setattr(buffer, name, shaped)
    late.generator_ready = True
    for turn in range(3):
        early_draw, late_draw = (drawn(each, 5, [0, turn]) for each in (buffer, late))
        assert all(torch.equal(early_draw[key], late_draw[key]) for key in ("obs", "action_masks"))
        assert len(early_draw["obs"]) == 5
    assert len({tuple(drawn(buffer, 5, [0, turn])["obs"].flatten().tolist()) for turn in range(5)}) == 5
    assert len(drawn(buffer, ALL, [0])["obs"]) == 32
    recurrent = CASES["recurrent, discrete"].model()
    recurrent.learn(48)
    for count, sequences in [(1, 1), (16, 1), (30, 2), (ALL, 3)]:
        seen = drawn(recurrent.rollout_buffer, count, [0])
        assert {len(value) for value in seen.values()} == {16 * sequences}


def test_a_rejected_update_never_was() -> None:
    """Weights, buffers and moments are those before it; the next rollout is of that policy, and trains on."""
    case = CASES["ppo, noisy features"]
    model = case.model()
    step = STEPCallback(budget=1e-12, controller=Gate())
    before = copy.deepcopy(model.policy.state_dict())
    moments = copy.deepcopy(model.policy.optimizer.state_dict())
    model.learn(STEPS, callback=step)
    assert step.optimizer.summary()["rejection_rate"] == 1.0
    assert equal(model.policy.state_dict(), before)
    assert equal(model.policy.optimizer.optimizer.state_dict()["state"], moments["state"])


def test_the_value_network_may_keep_its_step() -> None:
    """What is rejected is the policy's; the value network has the bits of the bare update, and its moments."""
    bare = Case().model()
    theta = copy.deepcopy(bare.policy.state_dict())
    bare.learn(32)
    model, step = Case().model(), STEPCallback(budget=1e-12, controller=Gate(), keep="unread")
    model.learn(32, callback=step)
    assert step.optimizer.last.action is Action.REJECT
    assert 0 < step.optimizer.last.kept < len(theta)
    state = step.optimizer.optimizer.state
    for name, weight in model.policy.named_parameters():
        is_value = "value" in name
        assert torch.equal(weight, (bare.policy.state_dict() if is_value else theta)[name]), name
        assert (weight in state) is is_value, name


def test_with_a_ledger_displacement_is_from_the_first_policy(tmp_path) -> None:
    """Over two stages, whatever the latest rollout is; and parameters may be named for `keep`."""
    model = Case().model()
    for stage in ("one", "two"):
        ledger = Ledger(tmp_path / "ledger.json", stage=stage)
        step = STEPCallback(budget=1e-3, ledger=ledger, keep=list(model.policy.value_net.parameters()))
        model.learn(64, callback=step)
        assert step.optimizer.last.reference_drift.mean == Ledger(tmp_path / "ledger.json").stages[-1].displacement
    steps = Ledger(tmp_path / "ledger.json").figures()
    assert steps["displacement"] > step.optimizer.last.accepted.mean


def test_a_shrunk_update_lies_on_the_line_to_the_bare_one() -> None:
    """It is theta_t + alpha (candidate - theta_t); the candidate is what the bare update makes of this rollout."""
    bare = Case().model()
    theta = copy.deepcopy(bare.policy.state_dict())
    bare.learn(32)
    model, step = Case().model(), STEPCallback(budget=1e-4)
    model.learn(32, callback=step)
    assert step.optimizer.last.action is Action.SHRINK
    candidate = bare.policy.state_dict()
    for name, weight in model.policy.state_dict().items():
        wanted = torch.lerp(theta[name].double(), candidate[name].double(), step.optimizer.last.alpha)
        torch.testing.assert_close(weight.double(), wanted, rtol=1e-5, atol=1e-7)


def test_the_budget_holds_what_its_options_say(tmp_path) -> None:
    """Options reach STEPOptimizer; slices are a function of what was drawn; figures are of the steps since a row."""

    def slices(seen: Any) -> dict[str, Any]:
        return {"left": seen["obs"][:, 0] < 0, "right": seen["obs"][:, 0] >= 0}

    model = Case().model()
    rows = watched(model)
    step = STEPCallback(
        Budget(mean=1e-3, slices={"left": 1e-4}),
        observations=24,
        slices=slices,
        controller=Gate(patience=1),
        adaptive_rate=True,
        log=str(tmp_path / "run.jsonl"),
    )
    model.learn(160, callback=step, log_interval=2)
    records = read_log(tmp_path / "run.jsonl")
    assert len(records) == 5
    assert step.optimizer.kl.prompts == 24
    assert all(record.accepted.slices["left"] <= 1e-4 for record in records)
    assert [record.notes["timesteps"] for record in records] == [32, 64, 96, 128, 160]
    logged = [row["step_optim/step"] for row in rows if "step_optim/step" in row]
    assert logged == [0.0, 2.0]
    shown = rows[1]["step_optim/mean_candidate_kl"]
    assert shown == pytest.approx(np.mean([record.candidate.mean for record in records[1:3]]))
    assert "step_optim/reference_drift" not in rows[1]
    with pytest.raises(ValueError, match="left"):
        other = Case().model()
        other.learn(32, callback=STEPCallback(Budget(mean=1.0, slices={"left": 1e-4})))


def resumed(model: Any, step: STEPCallback, seed: int = 7) -> Any:
    """Go on for three updates from seeds that are set, and return what came out."""
    model._last_obs = None
    model.get_env().seed(seed)
    set_random_seed(seed)
    model.learn(STEPS, callback=step, reset_num_timesteps=False)
    last = step.optimizer.last
    return (
        state(model),
        last.candidate,
        last.accepted,
        last.reference_drift,
        last.alpha,
        step.optimizer.summary()["path_length"],
    )


@pytest.mark.parametrize("name", RESUMED)
@pytest.mark.parametrize(
    "budget", [Budget(mean=1e-3), Budget(mean=1e-3, drift=2e-3), Budget.auto(8, 0.2)], ids=["mean", "drift", "auto"]
)
def test_a_saved_model_goes_on_as_it_would_have(name, budget, tmp_path) -> None:
    """Weights, moments, figures, drift and path, bit for bit; the checkpoint is the bare library's to read, too."""
    case = CASES[name]
    model, step = case.model(), STEPCallback(budget, observations=5)
    model.learn(STEPS, callback=step)
    model.save(tmp_path / "model")
    loaded = case.algorithm.load(tmp_path / "model", env=case.env(), device="cpu")
    assert isinstance(loaded.step_optim, dict)
    assert not hasattr(loaded.policy.optimizer, "last")
    assert equal(loaded.policy.state_dict(), model.policy.state_dict())
    if case.algorithm is RecurrentPPO:  # its states are no part of what it saves
        model._last_lstm_states = copy.deepcopy(loaded._last_lstm_states)
    another = STEPCallback(budget, observations=5)
    assert equal(resumed(loaded, another), resumed(model, step))
    assert (another.optimizer.kl.state_dict().get("weights") is not None) == budget.caps_drift


def check_cap(first: Any, seen: list[Seen], cap: float) -> None:
    """No update ends beyond the cap, or farther beyond it than it began on its rollout."""
    for update in seen:
        assert update.kl_from(first) <= max(cap, update.kl_from(first, before=True)) * (1 + 1e-3)


def test_drift_is_from_the_first_learn_unless_it_restarts(tmp_path) -> None:
    """Over later ones, another callback and a resume; the cap is on what an observer measures."""
    budget = Budget(drift=1e-3)
    model, step = Case().model(), STEPCallback(budget, observations=ALL)
    with observed(model) as seen:
        model.learn(STEPS, callback=step)
        model.learn(STEPS, callback=step)
        model.learn(STEPS, callback=STEPCallback(budget, observations=ALL))
    model.save(tmp_path / "model")
    first = seen[0].before
    loaded = PPO.load(tmp_path / "model", env=Case().env(), device="cpu")
    with observed(loaded) as later:
        step = STEPCallback(budget, observations=ALL)
        loaded.learn(STEPS, callback=step)
    check_cap(first, seen + later, 1e-3)
    assert step.optimizer.last.reference_drift.mean == reference.near(later[-1].kl_from(first), rel=1e-3)
    for again in (model, loaded):
        step = STEPCallback(budget, observations=ALL, restart_drift=True)
        with observed(again) as anew:
            again.learn(STEPS, callback=step)
        check_cap(anew[0].before, anew, 1e-3)
        wanted = anew[-1].kl_from(anew[0].before)
        assert step.optimizer.last.reference_drift.mean == reference.near(wanted, rel=1e-3)
        with observed(again) as anew:
            again.learn(STEPS, callback=step)
        check_cap(anew[0].before, anew, 1e-3)


@pytest.mark.parametrize("budget", [1e-3, Budget(mean=1e-3, drift=1e-2)], ids=["mean", "drift"])
def test_runs_begin_from_bare_models_and_the_other_way_round(budget, tmp_path) -> None:
    """A bare checkpoint resumes under a budget, a wrapped one without; a cap may come or go at a resume."""
    case = Case()
    bare = case.model()
    bare.learn(32)
    bare.save(tmp_path / "bare")
    step = STEPCallback(budget)
    loaded = PPO.load(tmp_path / "bare", env=case.env(), device="cpu")
    loaded.learn(64, callback=step)
    assert step.optimizer.summary()["steps"] == 2
    parameters = copy.deepcopy(loaded.get_parameters())
    loaded.save(tmp_path / "wrapped")
    again = PPO.load(tmp_path / "wrapped", env=case.env(), device="cpu")
    assert "train" not in vars(again)
    again.learn(32)
    again.set_parameters(parameters)
    assert equal(again.policy.state_dict(), loaded.policy.state_dict())
    loaded.learn(32, callback=step)
    loaded.set_parameters(parameters)
    assert step.optimizer.summary()["steps"] == 2
    other = Budget(mean=1e-3) if isinstance(budget, Budget) else Budget(mean=1e-3, drift=1e-2)
    turned = PPO.load(tmp_path / "wrapped", env=case.env(), device="cpu")
    another = STEPCallback(other)
    turned.learn(64, callback=another)
    assert another.optimizer.summary()["steps"] == 4
    assert bits(list(turned.policy.parameters())) != bits(list(loaded.policy.parameters()))


def test_other_callbacks_go_on_beside_it(tmp_path) -> None:
    """Evaluations and checkpoints in the middle of a run, before and after it in the list, change nothing."""
    alone, step = Case().model(), STEPCallback(1e-3)
    alone.learn(STEPS, callback=step)
    wanted = state(alone)
    model, step = Case().model(), STEPCallback(1e-3)
    saves = CheckpointCallback(32, str(tmp_path), name_prefix="run")
    evaluation = EvalCallback(Case(envs=1).env(), eval_freq=24, n_eval_episodes=1, verbose=0, warn=False)
    model.learn(STEPS, callback=[saves, step, evaluation])
    assert equal(state(model)[:2], wanted[:2])
    paths = sorted(Path(tmp_path).glob("run_*.zip"))
    assert len(paths) == 1
    assert PPO.load(paths[0], device="cpu").step_optim["step"] in (1, 2)
    assert np.isfinite(evaluation.last_mean_reward)


def test_an_update_that_fails_is_undone() -> None:
    """An error in ``train()`` puts back the weights of before the update, and the model trains on afterwards."""

    class Failing(PPO):
        fails = False

        def train(self) -> None:
            super().train()
            if self.fails:
                raise OSError("disk full")

    model = Failing("MlpPolicy", Case().env(), n_steps=16, batch_size=16, n_epochs=1, seed=0, device="cpu")
    step = STEPCallback(1e-3)
    model.learn(32, callback=step)
    before = copy.deepcopy(model.policy.state_dict())
    model.fails = True
    with pytest.raises(OSError, match="disk full"):
        model.learn(32, callback=step)
    assert equal(model.policy.state_dict(), before)
    model.fails = False
    model.learn(32, callback=step)
    assert not equal(model.policy.state_dict(), before)


def test_a_callback_may_serve_one_model_after_the_other() -> None:
    """And a model one callback after the other; the latest one counts."""
    step = STEPCallback(1e-3)
    models = [Case().model() for _ in range(2)]
    for model in models:
        model.learn(32, callback=step)
    assert step.optimizer is models[1].policy.optimizer
    wider = STEPCallback(0.5, controller=Project())
    models[0].learn(32, callback=wider)
    assert models[0].policy.optimizer.budget == Budget(mean=0.5)
    assert not hasattr(models[0].policy.optimizer.optimizer, "last")
    models[0].learn(32)  # without a callback it stays under the latest budget
    assert wider.optimizer.summary()["steps"] == 3


def test_bad_arguments_are_refused() -> None:
    """When the callback is made, or when a run begins that it does not fit."""
    with pytest.raises(TypeError, match="observations='all'"):
        STEPCallback(0.1, observations="all")
    with pytest.raises(ValueError, match="observations=0"):
        STEPCallback(0.1, observations=0)
    with pytest.raises(TypeError, match="slices="):
        STEPCallback(0.1, slices={"a": [0]})
    with pytest.raises(TypeError, match="kl= is what"):
        STEPCallback(0.1, kl=lambda: 0.0)
    with pytest.raises(TypeError, match="no_option"):
        STEPCallback(0.1, no_option=1)
    with pytest.raises(ValueError, match="budget"):
        STEPCallback(-1.0)
    with pytest.raises(RuntimeError, match="no optimizer yet"):
        STEPCallback(0.1).optimizer  # noqa: B018
    with pytest.raises(TypeError, match="DQN is no on-policy algorithm"):
        DQN("MlpPolicy", Case().env(), device="cpu", buffer_size=10).learn(4, callback=STEPCallback(0.1))
    with pytest.warns(UserWarning, match="target_kl=0.01"):
        Case(options={"target_kl": 0.01}).model().learn(32, callback=STEPCallback(0.1))


def test_policies_without_a_kl_are_refused() -> None:
    """A mixture has none; a distribution of the user's own has none of torch's in it."""

    class Mixed(CategoricalDistribution):
        def proba_distribution(self, action_logits: Any) -> Any:
            super().proba_distribution(action_logits)
            means = action_logits[..., None].expand(-1, -1, 1)
            self.distribution = MixtureSameFamily(self.distribution, Independent(Normal(means, 1.0), 1))
            return self

    model = Case().model()
    model.policy.action_dist = Mixed(3)
    model.policy._get_action_dist_from_latent = lambda latent: Mixed(3).proba_distribution(
        model.policy.action_net(latent)
    )
    fn = policy_of(model.policy, 16)
    with pytest.raises(TypeError, match="MixtureSameFamily policies has no closed form"):
        PolicyKL(fn, observations={"obs": torch.zeros(4, 3)}, model=model.policy)
    with pytest.raises(TypeError, match="StateDependentNoiseDistribution has no distribution"):
        torch_distribution(StateDependentNoiseDistribution(2))


def test_a_checkpoint_is_plain_values(tmp_path) -> None:
    """What is saved of a trust region unpickles as a dict, so that it loads where this package is not installed."""
    model, step = Case().model(), STEPCallback(Budget(drift=0.1))
    model.learn(32, callback=step)
    kept = model.step_optim.__reduce__()
    assert kept[0] is dict
    assert set(kept[1][0]) >= {"version", "step", "kl"}
    assert "weights" in kept[1][0]["kl"]
    model.save(tmp_path / "model")
    data = json.loads(zipfile.ZipFile(tmp_path / "model.zip").read("data"))
    assert "train" not in data
    assert "_excluded_save_params" not in data
