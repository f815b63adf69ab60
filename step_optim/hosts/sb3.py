"""STEP in stable-baselines3 and sb3-contrib: one callback for PPO, A2C, RecurrentPPO and MaskablePPO."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from step_optim.audit import PolicyKL
from step_optim.budget import Bound, Budget
from step_optim.hosts.columns import Recent
from step_optim.hosts.rollouts import Drawn, drawn, policy_of
from step_optim.optimizer import STEPOptimizer

HANDLE = "step_optim"
"""The attribute of a model that has its `TrustRegion`; of a model that was loaded, what is in its checkpoint."""


class STEPCallback(BaseCallback):
    """Gives the policy of a stable-baselines3 model a trust region, for one more argument of ``learn()``.

    ::

        model = PPO("MlpPolicy", "CartPole-v1", learning_rate=3e-3)
        model.learn(100_000, callback=STEPCallback(budget=0.02))

    From then on ``model.policy.optimizer`` is a `STEPOptimizer`, and each
    ``train()`` of the model is one candidate: all of its epochs and minibatches
    together, audited once, on observations of the rollout that it was made of.
    What stands is within the budget; the value network is shortened along with
    the policy, or keeps its step with ``keep="unread"``. The model's logger gets columns ``step_optim/...``; see
    `columns`. ``model.save()`` and ``load()`` keep what a resumed run needs:
    pass the callback to its ``learn()`` again.

    If the budget caps the drift, it is measured from the policy at the first
    ``learn()``, over later ones and over resumes, on the latest rollout.

    Args:
        budget: as of `STEPOptimizer`, in nats per action.
        observations: how many of a rollout's are measured, at most; they are drawn anew for each update. Of a recurrent
            policy whole environments are.
        slices: a function of the observations that were drawn (see `drawn`), which returns slices as
            `PolicyKL.observe` takes them.
        seed: of the draws. The global random streams are left alone.
        restart_drift: whether this ``learn()`` makes its policy pi_ref, although another one is known.
        verbose: as of any callback.
        **options: others of `STEPOptimizer`'s: controller, log, adaptive_rate, on_error, ledger, ...

    Raises:
        TypeError: an argument of the wrong kind; an option that `STEPOptimizer` does not have.
        ValueError: no observations.

    >>> STEPCallback(budget=0.02).budget
    Budget(mean=0.02)
    """

    def __init__(
        self,
        budget: Budget | Bound,
        *,
        observations: int = 512,
        slices: Callable[[Drawn], Any] | None = None,
        seed: int = 0,
        restart_drift: bool = False,
        verbose: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(verbose)
        if isinstance(observations, bool) or not isinstance(observations, int):
            raise TypeError(f"observations={observations!r:.60} is no number of observations; give 512, say")
        if observations < 1:
            raise ValueError(f"observations={observations} measures nothing; give at least 1, better 512")
        if slices is not None and not callable(slices):
            raise TypeError(f"slices={slices!r:.60} is no function; each rollout has others: lambda seen: {{...}}")
        if "kl" in options:
            raise TypeError("kl= is what this callback makes of the rollouts; use STEPOptimizer itself for another one")
        self.budget = Budget.of(budget)
        self.count, self.slices, self.seed = observations, slices, seed
        self._restart, self._options = restart_drift, options
        self._region: TrustRegion | None = None
        named = {} if isinstance(options.get("keep"), str) else {"keep": None}  # parameters of a model that comes later
        trial = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
        self._made(trial, process_group=None, log=None, recorder=None, ledger=None, **named)

    @property
    def has_ledger(self) -> bool:
        """Whether displacement is entered into a ledger."""
        return self._options.get("ledger") is not None

    def _made(self, optimizer: torch.optim.Optimizer, **instead: Any) -> STEPOptimizer:
        return STEPOptimizer(optimizer, budget=self.budget, **(self._options | instead))

    @property
    def optimizer(self) -> STEPOptimizer:
        """The model's optimizer: its ``last`` record, its ``summary()``.

        Raises:
            RuntimeError: no ``learn()`` has begun.
        """
        if self._region is None:
            raise RuntimeError("STEPCallback has no optimizer yet; pass it to model.learn(..., callback=...) first")
        return self._region.optimizer

    def _init_callback(self) -> None:
        """Give the model the trust region, at the beginning of ``learn()``."""
        known = getattr(self.model, HANDLE, None)
        if known is None or known is not self._region:
            self._region = self._attached(_checked(self.model), known)
        elif self._restart:
            self._region.restart_drift()

    def _attached(self, model: OnPolicyAlgorithm, known: Any) -> TrustRegion:
        bare: Any = model.policy.optimizer
        before = _plain(known)
        if isinstance(known, TrustRegion):
            bare = known.optimizer.optimizer
            known.detach()
        optimizer = self._made(bare)
        if before is not None:
            optimizer.load_state_dict({**bare.state_dict(), "step_optim": self._fitting(before)})
        region = TrustRegion(model, optimizer, self)
        region.attach()
        return region

    def _fitting(self, before: dict[str, Any]) -> dict[str, Any]:
        """What a run before this one knows, without a pi_ref that is not wanted, or whose weights it did not keep."""
        forgets = self._restart or (self.budget.caps_drift and "weights" not in before["kl"])
        return before | {"kl": {}} if forgets else before

    def _on_step(self) -> bool:
        return True


class TrustRegion:
    """What makes each ``train()`` of a model one window of a `STEPOptimizer`.

    It replaces the model's method by itself, and is an attribute of the model
    that is saved with it: as plain values and tensors, which load without this
    package.

    Args:
        model: an on-policy algorithm.
        optimizer: around the one of its policy.
        settings: how it measures.
    """

    def __init__(self, model: OnPolicyAlgorithm, optimizer: STEPOptimizer, settings: STEPCallback) -> None:
        self.model, self.optimizer, self._settings = model, optimizer, settings
        self._bare: Callable[[], None] = model.train
        self._recent = Recent()

    def attach(self) -> None:
        """Put itself in the place of the model's own ``train()``, and the optimizer into its policy."""
        excluded = self.model._excluded_save_params()
        here: Any = self.model
        here.train, here._excluded_save_params = self.train, lambda: [*excluded, "train", "_excluded_save_params"]
        self.model.policy.optimizer = self.optimizer
        setattr(self.model, HANDLE, self)
        self._recent.begin(self.optimizer)

    def detach(self) -> None:
        """Give the model back what it had."""
        self.model.policy.optimizer = self.optimizer.optimizer
        for name in ("train", "_excluded_save_params", HANDLE):
            vars(self.model).pop(name, None)

    def train(self) -> None:
        """One update: the model's own, on a window, measured on its rollout."""
        self._observe()
        self.optimizer.note(timesteps=self.model.num_timesteps)
        with self.optimizer.window():
            self._bare()
        self._record()

    def _observe(self) -> None:
        kl, settings, buffer = self.optimizer.kl, self._settings, self.model.rollout_buffer
        turn = self.optimizer.summary()["steps"]  # a resumed run draws as one that went on
        seen = drawn(buffer, settings.count, [settings.seed, turn])
        slices = None if settings.slices is None else settings.slices(seen)
        if isinstance(kl, PolicyKL):
            kl.observe(seen, slices)
            return
        keeps = self.optimizer.budget.caps_drift or settings.has_ledger  # the path has one beginning
        policy, drift = self.model.policy, "keep" if keeps else None
        fn = policy_of(policy, buffer.buffer_size)
        self.optimizer.bind(PolicyKL(fn, slices, observations=seen, model=policy, drift=drift))

    def restart_drift(self) -> None:
        """Make the policy at the next update pi_ref."""
        self.optimizer.refresh(restart_drift=True)

    def _record(self) -> None:
        """Log the updates since the last row: the logger forgets what it has written."""
        logger = self.model.logger
        if "step_optim/step" not in logger.name_to_value:
            self._recent.take(self.optimizer)
        self._recent.see(self.optimizer)
        for name, value in self._recent.row(self.optimizer).items():
            if name != "step_optim/reference_drift" or self.optimizer.budget.caps_drift:
                logger.record(name, value)

    def __reduce__(self) -> Any:
        return dict, (_plain(self),)


def _plain(known: Any) -> dict[str, Any] | None:
    """What a checkpoint has of a trust region."""
    if isinstance(known, TrustRegion):
        return dict(known.optimizer.state_dict()["step_optim"])
    return dict(known) if isinstance(known, Mapping) else None


def _checked(model: Any) -> OnPolicyAlgorithm:
    """Refuse a model whose policy is not measured on rollouts; warn of a second trust region."""
    if not isinstance(model, OnPolicyAlgorithm):
        raise TypeError(
            f"STEPCallback: {type(model).__name__} is no on-policy algorithm, and has no rollouts to measure on; use "
            "PPO, A2C, RecurrentPPO or MaskablePPO, or STEPOptimizer itself"
        )
    if not hasattr(model.policy, "get_distribution"):
        raise TypeError(
            f"STEPCallback: {type(model.policy).__name__} has no get_distribution(); derive the policy from "
            "ActorCriticPolicy"
        )
    target = getattr(model, "target_kl", None)
    if target is not None:
        warnings.warn(
            f"the model stops an update early at target_kl={target}, and STEPCallback limits it too: there are two "
            "trust regions. The early stop stays as it is; model.target_kl = None switches it off",
            stacklevel=2,
        )
    return model
