"""One training run held at one step, on which every method makes the same step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from measure import Checkpoint, Method, allocated
from naive import NaiveSTEP, Padded
from today import KLPenalty, LineSearch, TargetKL
from torch import Tensor, nn

from step_optim import Budget, Controller, ControlSet, Gate, Interpolate, STEPOptimizer, TokenKL
from step_optim.telemetry.summary import PHASES

CANDIDATE_KL = 0.05
"""Nats per token that the measured step proposes to move: the learning rate is set to that."""

SHRINK_TO = 0.3
"""Budget of a triggered step, as a part of what the candidate moves."""

ROOMY = 3.0
"""Budget of a committed step, likewise."""

WARM_UP = 3
"""Bare steps before it: the first ones of LoRA are unlike all others."""

SLOW = ("STEP strict", "STEP bisect", "STEP backtrack")
"""Other searches; "STEP interpolate" stands for their memory."""

LEARNING_RATE = 1e-4
"""Where the search for the learning rate starts."""


def interpolate(**options: Any) -> Interpolate | None:
    """The controller with these options; None if this version has not got one of them."""
    known = {f.name for f in fields(Interpolate)}
    return Interpolate(**options) if options.keys() <= known else None


class Bench:
    """A model, AdamW, a control set and a batch, and the methods that make a step of them.

    Every method starts from the same weights and optimizer state. For STEP that includes the reference that the
    step before has left: an untimed step, rejected by a gate, takes it.
    """

    def __init__(self, model: nn.Module, ids: Tensor, control: ControlSet) -> None:
        self.model, self.ids, self.control = model, ids, control
        trained = [p for p in model.parameters() if p.requires_grad]
        self.inner = torch.optim.AdamW(trained, lr=LEARNING_RATE)
        for _ in range(WARM_UP):
            self.backward()
            self.inner.step()
        self.inner.zero_grad()
        self.start = Checkpoint(self.inner)
        self.padded = Padded.of(control)
        _, self.kept = allocated(self._wrap, ids.device)
        self.moved = self.anchor()

    def _wrap(self) -> None:
        """Put STEP around the optimizer. What one step leaves behind is what it keeps from step to step."""
        self.kl = TokenKL(self.model, self.control, noise_floor=False)
        self.optimizer = STEPOptimizer(self.inner, kl=self.kl, budget=0.0)
        self.anchor()
        self.start.put_back()

    def calibrate(self) -> None:
        """Set the learning rate at which the candidate moves about `CANDIDATE_KL`."""
        for _ in range(5):
            if 0.5 < self.moved / CANDIDATE_KL < 2:
                return
            factor = math.sqrt(CANDIDATE_KL / self.moved) if self.moved > 0 else 10.0
            for group in self.inner.param_groups:
                group["lr"] *= min(max(factor, 0.1), 10.0)
            self.moved = self.anchor()

    def anchor(self) -> float:
        """Put everything back, with the reference known; returns what the candidate moves."""
        self.start.put_back()
        self.optimizer.controller = Gate()
        self.optimizer.set_budget(0.0)
        self.backward()
        self.optimizer.step()
        assert self.optimizer.last is not None
        self.worst = max(self.optimizer.last.candidate.slices.values(), default=0.0)
        return self.optimizer.last.candidate.mean

    def backward(self) -> None:
        """The training loss and its gradients."""
        self.inner.zero_grad()
        self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss.backward()

    def budget(self, part: float) -> dict[str, float]:
        """As a part of the candidate's movement, for the mean and for every slice."""
        return {"mean": part * self.moved, "slices": part * self.worst}

    def method(self, name: str, step: Any, **parts: Any) -> Method:
        """A method whose step starts from the common weights."""
        return Method(name, step, **{"backward": self.backward, "prepare": self.start.put_back} | parts)

    def bare(self) -> Method:
        """Forward, backward, AdamW."""
        return self.method("bare", self.inner.step)

    def forward(self) -> Method:
        """The unit of cost: one forward over the control set, a padded batch with all its logits."""
        return Method("forward", lambda: self.padded.logits(self.model), prepare=self.start.put_back)

    def wrapped(self, name: str, controller: Controller, part: float) -> Method:
        """STEP with a controller, at a part of the candidate's movement as budget."""

        def prepare() -> None:
            self.anchor()
            self.optimizer.controller = controller
            self.optimizer.set_budget(Budget(**self.budget(part)))

        return self.method(name, self.optimizer.step, prepare=prepare, facts=self.facts, slow=name in SLOW)

    def facts(self) -> Mapping[str, float]:
        """What STEP recorded of the latest step."""
        record = self.optimizer.last
        assert record is not None
        alpha = {} if record.alpha is None else {"alpha": record.alpha}
        return {"trials": len(record.trials), **alpha, **{phase: record.seconds[phase] for phase in PHASES}}

    def naive(self, name: str, part: float, kind: type[NaiveSTEP] = NaiveSTEP) -> Method:
        """Algorithm 1 as written, or the line search."""
        made = kind(self.model, self.inner, self.control, **self.budget(part))
        return self.method(name, made.step, facts=lambda: {"trials": made.audits}, slow=part < 1)

    def penalty(self) -> Method:
        """A KL penalty in the loss."""
        made = KLPenalty(self.model, self.ids)

        def backward() -> None:
            self.inner.zero_grad()
            made.loss().backward()

        return self.method("KL penalty", self.inner.step, backward=backward)

    def target_kl(self) -> Method:
        """PPO's early stop."""
        self.start.put_back()
        return self.method("target KL", TargetKL(self.model, self.inner, self.ids, SHRINK_TO * self.moved).step)

    def methods(self) -> list[Method]:
        """All of them; the bare step and the plain forward come first."""
        controllers = {
            "STEP gate": Gate(),
            "STEP interpolate": interpolate(),
            "STEP strict": interpolate(strict=True),
            "STEP bisect": interpolate(search="bisect"),
            "STEP backtrack": interpolate(search="backtrack", tol=0.5),
        }
        return [
            self.bare(),
            self.forward(),
            self.wrapped("STEP commit", Interpolate(), ROOMY),
            *(self.wrapped(name, made, SHRINK_TO) for name, made in controllers.items() if made is not None),
            self.naive("naive commit", ROOMY),
            self.naive("naive interpolate", SHRINK_TO),
            self.penalty(),
            self.target_kl(),
            self.naive("line search", SHRINK_TO, LineSearch),
        ]

    def few(self) -> list[Method]:
        """Those that the cost curves compare."""
        return [self.bare(), self.forward(), self.wrapped("STEP commit", Interpolate(), ROOMY)]
