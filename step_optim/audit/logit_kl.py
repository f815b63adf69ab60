"""LogitKL: what `TokenKL` and `PolicyKL` share, and what `Project` works on: policies that are rows of logits."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from step_optim.audit import divergence as statistic
from step_optim.audit.closure import Audit
from step_optim.audit.reference_kl import ReferenceKL
from step_optim.audit.rows import Head, Reader, Rows, Scratch, vocab_blocks
from step_optim.isolation.eval_mode import isolated


class LogitKL(ReferenceKL):
    """A `ReferenceKL` whose policies are logit `Rows`: what `Project` needs."""

    has_logits = True

    def __init__(self) -> None:
        super().__init__()
        self._scratch = Scratch()

    prompts: int
    """C."""
    _prompt_of_row: Tensor
    """[R] prompt index of each row."""
    _factors = 1
    """How many rows of a prompt are factors of one action, whose KLs add up: the mean over rows counts so often."""

    @abstractmethod
    def _batches(self) -> Iterable[tuple[Tensor, Tensor]]:
        """Evaluate the current weights batch by batch, in a fixed layout: (which rows, their features [r, D])."""

    def _head(self, *, live: bool) -> Head | None:
        """The head over the features; with ``live`` the one that gradients go to, else one that stays as it is."""
        return None

    def _policy(self) -> Rows:
        return self._gather(self._batches(), self._head(live=False))

    def _gather(self, parts: Iterable[tuple[Tensor, Tensor]], head: Head | None) -> Rows:
        """Put the rows of all batches back in their order."""
        x: Tensor | None = None
        for rows, part in parts:
            if x is None:
                x = part.new_empty(len(self._prompt_of_row), part.shape[1])
            x.index_copy_(0, rows, part)
        assert x is not None
        return Rows(x, head)

    @abstractmethod
    def _read_origin(self, state: Mapping[str, Any]) -> Any:
        """Read pi_ref from what `state_dict` returned, which may be of another run, or damaged in any way."""

    def _loaded(self, state: Mapping[str, Any]) -> Any:
        try:
            origin = self._read_origin(state)
            damage = "NaN in it" if any(value.isnan().any() for value in _values(state)) else None
        except torch.OutOfMemoryError:
            raise
        except (LookupError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(f"the checkpoint's pi_ref is damaged ({type(error).__name__}: {error})") from error
        if damage:
            raise ValueError(f"the checkpoint's pi_ref is damaged ({damage})")
        return origin

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """Refuse a pi_ref of another control set or another policy, or one that is damaged."""
        if state:
            self._loaded(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over pi_ref."""
        if state:
            self._origin = self._loaded(state)

    def _per_prompt(self, rows: Tensor) -> Tensor:
        return statistic.prompt_means(rows, self._prompt_of_row, self.prompts)

    def _prompt_kls(self, candidate: Any, references: Sequence[Any]) -> list[list[float]]:
        streamed = statistic.stream_kl(references, candidate, scratch=self._scratch)
        means = self._factors * self._per_prompt(streamed.kl)
        # The one place where the host waits for the device.
        *figures, doubtful = torch.cat([means.flatten(), streamed.doubtful.any()[None]]).tolist()
        if doubtful:
            settled = statistic.settle(streamed, references, candidate)
            figures = (self._factors * self._per_prompt(settled)).flatten().tolist()
        return [figures[j * self.prompts : (j + 1) * self.prompts] for j in range(len(references))]

    def prompt_kl(self, candidate: Audit, strength: Tensor, prompts: Tensor | None = None) -> Tensor:
        """KL of prompts at the mixture (1 - lambda) l_reference + lambda l_candidate, [P] float64 on the CPU.

        Args:
            candidate: the audit of the candidate.
            strength: lambda of each of the prompts, [P].
            prompts: indices [P], which may repeat; all C by default.
        """
        chosen = range(self.prompts) if prompts is None else prompts.tolist()
        prompt_of_row = self._prompt_of_row.cpu()
        rows = [(prompt_of_row == prompt).nonzero().flatten() for prompt in chosen]
        place = torch.cat([torch.full_like(part, i) for i, part in enumerate(rows)])
        index = torch.cat(rows).to(self._prompt_of_row.device)
        with torch.no_grad():
            found = statistic.row_kl(
                self._reference[index], candidate.policy[index], strength[place].to(self._prompt_of_row.device)
            )
        return self._factors * statistic.prompt_means(found.cpu(), place, len(rows))

    def distance(self, audit: Audit, candidate: Audit, strength: Tensor | None = None) -> float:
        """Mean ‖l_theta - l_lambda‖² of an audited policy; the objective of the paper's projection at lambda = 1.

        The mean is over the rows of a prompt first, then over prompts; the sum
        of squares is over the vocabulary. l_lambda is the mixture of
        `prompt_kl`, the candidate itself if no ``strength`` is given.
        """
        row_strength = 1.0 if strength is None else strength.to(self._prompt_of_row.device)[self._prompt_of_row, None]
        squares = torch.zeros(len(self._prompt_of_row), dtype=torch.float64, device=self._prompt_of_row.device)
        with torch.no_grad():
            reader = Reader(self._reference, [audit.policy, candidate.policy], self._scratch)
            for start, stop in vocab_blocks(self._reference):
                _, (here, there) = reader.read(start, stop)
                squares += (here - there * row_strength).square().sum(1)
            return float(self._per_prompt(squares).mean())

    def distill(
        self, candidate: Audit, strength: Tensor, parameters: Sequence[Tensor]
    ) -> tuple[Audit, float, list[Tensor]]:
        """Measure the current weights, and the gradient of their distance to a mixture.

        Args:
            candidate: the audit of the candidate.
            strength: lambda of each prompt, [C].
            parameters: what to differentiate with respect to.

        Returns:
            The audit of the current weights; the loss, mean ‖l_theta - l_lambda‖²; its gradients.
        """
        rows_of = torch.bincount(self._prompt_of_row, minlength=self.prompts)
        weight = 1.0 / (rows_of[self._prompt_of_row] * self.prompts)  # per prompt first, then over prompts
        trained = [p for p in parameters if p.requires_grad]
        gradients = {id(p): torch.zeros_like(p) for p in parameters}
        total, parts = 0.0, []
        with isolated(self.modules(), grad=True, watch=self._watch):
            for rows, x in self._batches():
                target = self._mixture(candidate.policy, strength, rows)
                logits = Rows(x, self._head(live=True)).logits()
                open_ = target.isfinite()  # not masked, for both policies
                off = torch.where(open_, logits, 0.0) - torch.where(open_, target, 0.0)
                loss = (off.square().sum(1) * weight[rows]).sum()
                for p, g in zip(trained, torch.autograd.grad(loss, trained, allow_unused=True), strict=True):
                    if g is not None:
                        gradients[id(p)] += g
                total += float(loss.detach())
                parts.append((rows, x.detach()))
        with torch.no_grad():
            policy = self._gather(parts, self._head(live=False))
            (moved,) = self._movements(policy, self._reference)
            return Audit(moved, policy), total, list(gradients.values())

    def _mixture(self, candidate: Rows, strength: Tensor, rows: Tensor) -> Tensor:
        """Logits (1 - lambda) l_reference + lambda l_candidate of some rows, without a graph."""
        with torch.no_grad():
            previous = self._reference[rows].logits()
            weight = strength.to(rows.device)[self._prompt_of_row[rows], None].to(previous.dtype)
            there = candidate[rows].logits()
            return torch.where(there == previous, previous, torch.lerp(previous, there, weight))


def _values(state: Any) -> Iterator[Tensor]:
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, Mapping):
        for value in state.values():
            yield from _values(value)
