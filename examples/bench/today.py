"""What is done today to keep a policy near: a penalty in the loss, an early stop, a line search."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from naive import NaiveSTEP
from torch import Tensor, nn


def taken(logits: Tensor, ids: Tensor) -> Tensor:
    """[B, T - 1] log-probabilities of the tokens that were taken."""
    log_probs = logits[:, :-1].log_softmax(-1, dtype=torch.float32)
    return log_probs.gather(-1, ids[:, 1:, None])[..., 0]


def k3(new: Tensor, old: Tensor) -> Tensor:
    """The estimate of KL(new ‖ old) per taken token that TRL uses: r - 1 - log r with r = old / new, never negative."""
    log_ratio = old - new
    return torch.expm1(log_ratio) - log_ratio


class KLPenalty:
    """Loss + beta KL(policy ‖ reference model) on the training batch: one more forward, with all its logits.

    The reference of an adapter is the model without it; of a whole model it is a copy.
    """

    def __init__(self, model: nn.Module, ids: Tensor, beta: float = 0.05) -> None:
        self.model, self.ids, self.beta = model, ids, beta
        self._adapter: Any = getattr(model, "disable_adapter", None)
        self._copy = None if self._adapter is not None else copy.deepcopy(model).eval()

    def loss(self) -> Tensor:
        """Cross-entropy and penalty."""
        with torch.no_grad(), self._reference() as reference:
            old = taken(reference(input_ids=self.ids, use_cache=False).logits, self.ids)
        new = taken(self.model(input_ids=self.ids, use_cache=False).logits, self.ids)
        return -new.mean() + self.beta * k3(new, old).mean()

    @contextlib.contextmanager
    def _reference(self) -> Iterator[nn.Module]:
        without: AbstractContextManager[Any] = self._adapter() if self._adapter else contextlib.nullcontext()
        with without:
            yield self._copy or self.model


class TargetKL:
    """PPO's early stop: after the step, the KL of the taken tokens on the training batch; stop the epoch above 1.5 x.

    The step itself stays. The old log-probabilities are those of the rollout, known beforehand.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor, target: float) -> None:
        self.model, self.optimizer, self.ids, self.target = model, optimizer, ids, target
        self.old = self._log_probs()

    def step(self) -> bool:
        """Take the step; whether to stop after it."""
        self.optimizer.step()
        return float(k3(self._log_probs(), self.old).mean()) > 1.5 * self.target

    @torch.no_grad()
    def _log_probs(self) -> Tensor:
        return taken(self.model(input_ids=self.ids, use_cache=False).logits, self.ids)


class LineSearch(NaiveSTEP):
    """TRPO's backtracking on the same step: 0.8^k until the control set is within its budgets, at most ten times."""

    def bisect(self, before: nn.Module, candidate: list[Tensor], reference: Tensor) -> float:
        """The first of 0.8, 0.64, ... that fits."""
        for k in range(1, self.trials + 1):
            self.write(before, candidate, 0.8**k)
            self.audits += 1
            if self.within(self.measure(reference)):
                return 0.8**k
        return 0.0
