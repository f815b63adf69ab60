"""The LoRA-PPO loop of all conditions: what differs between them is read from the table in `config`.

A run is resumable after a kill at any point: every update ends with a checkpoint that replaces the last one at once.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ppo
import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

import step_optim
from step_optim import Action, Budget, STEPOptimizer, StepRecord, TokenKL, read_log
from step_optim.objective import AdaptiveKL, EMAReference, FixedReference, RatchetReference, TargetKL, sampled_kl
from study.config import ARMS, BRANCH_FROM, CONDITIONS, Arm, Condition, run_settings
from study.running.world import World, once, stream
from study.traces import Run

REFERENCES = {"fixed": FixedReference, "ema": EMAReference, "ratchet": RatchetReference}
Say = Callable[[int], None]


@dataclass
class Learner:
    """One run's policy, and all that changes with it."""

    world: World
    arm: Arm
    condition: Condition
    seed: int
    model: PeftModel
    log: Path | None = None
    updates: list[dict[str, Any]] = field(default_factory=list)
    """what `traces.Run.updates` says, so far"""

    def __post_init__(self) -> None:
        """Build the optimizer, the audits and the parts of the objective."""
        study, condition = self.world.study, self.condition
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.rate = self.arm.learning_rate * self.world.learning_rate_factor
        inner = torch.optim.AdamW(
            self.parameters, lr=self.rate, betas=study.adam_betas, weight_decay=study.weight_decay
        )
        self.control = TokenKL(self.model, self.world.control, noise_floor=False)
        self.optimizer = STEPOptimizer(
            inner,
            kl=self.control,
            budget=budget_of(self.world, condition),
            controller=getattr(step_optim, condition.controller)(**condition.options),
            warm_start=condition.warm_start,
            log=self.log,
        )
        self.held = TokenKL(self.model, self.world.held_out, noise_floor=False)  # watches, and decides nothing
        self.held.anchor()
        self.reference = REFERENCES[condition.reference](self.model, **condition.reference_options)
        adaptive, target = condition.adaptive_kl, condition.target_kl
        self.adaptive = None if adaptive is None else AdaptiveKL(study.beta, **adaptive)
        self.target = None if target is None else TargetKL(target)

    @property
    def t(self) -> int:
        """The update to come."""
        return len(self.updates)

    @property
    def shocked(self) -> bool:
        """Whether the learning rate of the update to come is multiplied."""
        return self.arm.shocked and self.t in self.world.study.shocks

    def update(self) -> None:
        """Roll out, and make one PPO update: one candidate of the optimizer."""
        started, shocked, t = time.monotonic(), self.shocked, self.t
        numbers = stream(self.seed, t)
        rollout = self.roll_out(numbers)
        self.optimizer.param_groups[0]["lr"] = self.rate * (self.world.study.shock_factor if shocked else 1.0)
        self.optimizer.note(reward=rollout.rewards.mean().item(), shock=shocked)
        beta = self.world.study.beta if self.adaptive is None else self.adaptive.coefficient
        minibatches, sampled = self.train_on(rollout, beta, numbers)
        record = self.optimizer.last
        moved = self.reference.update(record.reference_drift.mean)
        if self.adaptive is not None:
            self.adaptive.update(reference_kl(rollout))
        seconds = time.monotonic() - started
        self.updates.append(
            {
                "t": t,
                "shock": shocked,
                **self.look(record.action is Action.REJECT),
                "seconds": seconds,
                "minibatches": minibatches,
                "sampled_kl": sampled if math.isfinite(sampled) else None,
                "beta": beta,
                "reference": str(moved),
            }
        )

    def roll_out(self, numbers: torch.Generator) -> ppo.Rollout:
        """Sample responses to this update's prompts."""
        world = self.world
        prompts = world.batch(numbers)
        return ppo.roll_out(self.model, world.tokenizer, prompts, world.reward, world.config, numbers, self.reference)

    def train_on(self, rollout: ppo.Rollout, beta: float, numbers: torch.Generator) -> tuple[int, float]:
        """Propose several minibatch steps; STEP audits and decides when the window closes.

        Returns how many were made, and the sampled KL of the last minibatch that was looked at.
        """
        made, sampled = 0, math.nan
        config = replace(self.world.config, beta=beta)
        with self.optimizer.window():
            for loss in ppo.minibatch_losses(self.model, rollout, config, numbers):
                sampled = float(sampled_kl(loss.log_ratio, loss.alive))
                if self.target is not None and self.target.exceeded(sampled):
                    break
                self.optimizer.zero_grad()
                loss.value.backward()
                clip_grad_norm_(self.parameters, config.max_grad_norm)
                self.optimizer.step()
                made += 1
        return made, sampled

    def look(self, rejected: bool) -> dict[str, Any]:
        """Measure what was committed on the held-out prompts."""
        if rejected:
            return {"held": plain(None, self.held.slices), "held_drift": self.held.drift().mean}
        audit = self.held.audit_with_drift()
        self.held.anchor(audit)
        return {"held": plain(audit.movement), "held_drift": self.held.drift(audit).mean}

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next update begins with; its random numbers are keyed on (seed, t)."""
        parts = {"reference": self.reference, "adaptive": self.adaptive, "target": self.target}
        return {
            "weights": [p.detach().clone() for p in self.parameters],
            "optimizer": self.optimizer.state_dict(),
            "held": self.held.state_dict(),
            "updates": self.updates,
            **{name: None if part is None else part.state_dict() for name, part in parts.items()},
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was."""
        for parameter, weight in zip(self.parameters, state["weights"], strict=True):
            parameter.copy_(weight)
        self.optimizer.load_state_dict(state["optimizer"])
        self.held.load_state_dict(state["held"])
        self.held.anchor()
        for part, saved in ((self.reference, "reference"), (self.adaptive, "adaptive"), (self.target, "target")):
            if part is not None:
                part.load_state_dict(state[saved])
        self.updates = list(state["updates"])


def make_run(world: World, names: tuple[str, str, int], root: Path, say: Say) -> dict[str, Any]:
    """Make, or finish, one run; return it as plain values.

    Args:
        world: what all runs share.
        names: arm, condition, seed.
        root: of all runs; this one has a folder of its own.
        say: is told the number of updates that are done.

    Raises:
        ValueError: the folder holds a run of other settings.
    """
    arm, condition, seed = names
    folder, wanted = root / arm / condition / str(seed), run_settings(world.study, arm, condition)
    if (folder / "run.json").exists():
        return checked(json.loads((folder / "run.json").read_text()), wanted, folder)
    folder.mkdir(parents=True, exist_ok=True)
    with world.adapted(seed) as model:
        learner = Learner(world, ARMS[arm], CONDITIONS[condition], seed, model, folder / "step.jsonl")
        before = once(root / "before" / f"{seed}.json", lambda: score(world, model, seed))
        resume(learner, folder, wanted)
        while learner.t < world.study.updates:
            say(learner.t)
            if (arm, condition) == BRANCH_FROM and learner.t in world.study.branch_at:
                write(learner.state_dict(), folder / f"before-{learner.t}.pt")
            learner.update()
            write(learner.state_dict() | {"settings": wanted}, folder / "checkpoint.pt")
        records = tuple(read_log(folder / "step.jsonl"))
        result = outcome(learner, records[-1], before, score(world, model, seed))
    run = Run(arm, condition, seed, records, tuple(learner.updates), result).to_dict()
    finish(run | {"settings": wanted}, folder)
    return run


def resume(learner: Learner, folder: Path, wanted: str) -> None:
    """Load the checkpoint that a killed run left; without one, begin a new log."""
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists():
        learner.load_state_dict(checked(torch.load(checkpoint, map_location=learner.world.device), wanted, folder))
    else:
        (folder / "step.jsonl").unlink(missing_ok=True)  # of an update that was never finished


def checked(saved: dict[str, Any], wanted: str, folder: Path) -> dict[str, Any]:
    """Refuse to mix runs of two configurations."""
    if saved.pop("settings") != wanted:
        raise ValueError(f"{folder} holds a run of other settings; remove it, or choose another --runs")
    return saved


def finish(run: dict[str, Any], folder: Path) -> None:
    """Put the finished run in place of its checkpoint."""
    (folder / "run.tmp").write_text(json.dumps(run))
    os.replace(folder / "run.tmp", folder / "run.json")
    (folder / "checkpoint.pt").unlink()


def write(state: dict[str, Any], path: Path) -> None:
    """Replace a checkpoint at once: a kill leaves the old one or the new one."""
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def budget_of(world: World, condition: Condition) -> Budget:
    """Return the budgets of a condition; infinite ones only measure."""
    study = world.study
    values = {"mean": study.budget_mean, "slices": study.budget_slices}
    return Budget(**{name: values[name] for name in condition.limits}) if condition.limits else Budget(mean=math.inf)


def score(world: World, model: PeftModel, seed: int) -> dict[str, Any]:
    """Return the held-out reward, by slice, and the NLL of base text."""
    rewards = world.held_out_reward(model, seed)
    return {"reward": sum(rewards.values()) / len(rewards), "reward_slices": rewards, "nll": world.nll(model)}


def outcome(learner: Learner, last: StepRecord, before: Any, after: Any) -> dict[str, Any]:
    """Return what `traces.Run.result` says; the last record is the log's: a resumed learner may have made no step."""
    held = learner.held
    return {
        **{f"{name}_before": value for name, value in before.items()},
        **after,
        "drift": plain(held.drift()),
        "control_drift": plain(last.reference_drift),
        "seconds": sum(update["seconds"] for update in learner.updates),
        "device": device_name(learner.world.device),
    }


def device_name(device: torch.device) -> str:
    """Return "cpu", or the name of the accelerator."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def plain(movement: Any, slices: Collection[str] = ()) -> dict[str, Any]:
    """Return a movement as plain values; None is no movement."""
    if movement is None:
        return {"mean": 0.0, "slices": dict.fromkeys(slices, 0.0)}
    return {"mean": movement.mean, "slices": dict(movement.slices)}


def reference_kl(rollout: ppo.Rollout) -> float:
    """Return the sampled KL of the policy that rolled out from the reference [nats per token]."""
    reference: Tensor = rollout.reference_logprobs.gather(-1, rollout.responses[..., None])[..., 0]
    return float(sampled_kl(reference - rollout.old_logprobs, rollout.alive))
