"""The paper's Algorithm 1 as written: what STEP costs if nothing is done about its cost.

Deep copies of model and optimizer state, both policies evaluated at every step over the whole vocabulary of every
position of one padded batch, the textbook KL, ten bisections. The reference is evaluated once a step, then kept.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from step_optim import ControlSet, Movement


@dataclass(frozen=True)
class Padded:
    """The control set as one batch, padded on the right. C prompts, T positions."""

    ids: Tensor
    """[C, T] prompt and response."""

    mask: Tensor
    """[C, T] 1 where there is a token."""

    predicts: Tensor
    """[C, T] True where the logits predict a response token."""

    @classmethod
    def of(cls, control: ControlSet) -> Padded:
        """Pad all prompts to the longest."""
        texts = [torch.cat(pair) for pair in zip(control.prompts, control.responses, strict=True)]
        ids = nn.utils.rnn.pad_sequence(texts, batch_first=True)
        mask, predicts = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        for x, (prompt, text) in enumerate(zip(control.prompts, texts, strict=True)):
            mask[x, : len(text)] = 1
            predicts[x, len(prompt) - 1 : len(text) - 1] = True  # the logits at t predict token t + 1
        return cls(ids, mask, predicts)

    @torch.no_grad()
    def logits(self, model: nn.Module) -> Tensor:
        """[C, T, V]: a plain forward with all its logits."""
        logits: Tensor = model(input_ids=self.ids, attention_mask=self.mask, use_cache=False).logits
        return logits

    def log_probs(self, model: nn.Module) -> Tensor:
        """[C, T, V] log pi(. | x, y<t), in evaluation mode."""
        training = model.training
        model.eval()
        log_probs = self.logits(model).log_softmax(-1, dtype=torch.float32)
        model.train(training)
        return log_probs


def movement(candidate: Tensor, previous: Tensor, batch: Padded, control: ControlSet) -> Movement:
    """K_global and K_s from two [C, T, V] of log-probabilities: sum over v of p_c (log p_c - log p_p)."""
    kl = (candidate.exp() * (candidate - previous)).sum(-1)
    kl = torch.where(batch.predicts, kl, 0.0)
    per_prompt = kl.sum(1) / batch.predicts.sum(1)
    slices = {name: float(per_prompt[list(members)].mean()) for name, members in control.slices.items()}
    return Movement(float(per_prompt.mean()), slices)


class NaiveSTEP:
    """Algorithm 1 around an optimizer.

    Args:
        model: a causal language model of transformers, or PEFT's around one.
        optimizer: the inner optimizer.
        control: the control prompts C with their slices S.
        mean: eps_g.
        slices: eps_s, one number for every slice.
        controller: "interpolation" or "hard gate", the paper's c.
        trials: bisections of alpha.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        control: ControlSet,
        *,
        mean: float,
        slices: float,
        controller: str = "interpolation",
        trials: int = 10,
    ) -> None:
        self.model, self.optimizer, self.control = model, optimizer, control
        self.mean, self.slices, self.controller, self.trials = mean, slices, controller, trials
        self.batch = Padded.of(control)
        self.audits = 0
        """Of the latest step, beyond the candidate's."""

    def step(self) -> float:
        """Propose, audit, decide; returns alpha: 1 committed, 0 rejected."""
        before, state = self._copies()
        self.optimizer.step()  # theta~
        candidate = copy.deepcopy(self._trained(self.model))
        reference = self.batch.log_probs(before)
        self.audits = 0
        if self.within(self.measure(reference)):
            return 1.0
        alpha = self.bisect(before, candidate, reference) if self.controller == "interpolation" else 0.0
        self.write(before, candidate, alpha)
        if alpha == 0:
            self.optimizer.load_state_dict(state)
        return alpha

    def _copies(self) -> tuple[nn.Module, dict[str, Any]]:
        """theta_t: the whole model and the optimizer's state."""
        return copy.deepcopy(self.model), copy.deepcopy(self.optimizer.state_dict())

    def measure(self, reference: Tensor) -> Movement:
        """Movement of the current weights."""
        return movement(self.batch.log_probs(self.model), reference, self.batch, self.control)

    def within(self, moved: Movement) -> bool:
        """K_global <= eps_g and max_s K_s <= eps_s."""
        return moved.mean <= self.mean and all(kl <= self.slices for kl in moved.slices.values())

    def bisect(self, before: nn.Module, candidate: list[Tensor], reference: Tensor) -> float:
        """The largest alpha in [0, 1] that was found within the budgets."""
        low, high = 0.0, 1.0
        for _ in range(self.trials):
            alpha = (low + high) / 2
            self.write(before, candidate, alpha)
            self.audits += 1
            low, high = (alpha, high) if self.within(self.measure(reference)) else (low, alpha)
        return low

    @torch.no_grad()
    def write(self, before: nn.Module, candidate: list[Tensor], alpha: float) -> None:
        """theta_t + alpha (theta~ - theta_t)."""
        for weight, old, new in zip(self._trained(self.model), self._trained(before), candidate, strict=True):
            weight.copy_(old + alpha * (new - old))

    @staticmethod
    def _trained(model: nn.Module) -> list[Tensor]:
        return [p for p in model.parameters() if p.requires_grad]
