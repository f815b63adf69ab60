"""LogitKL: what `TokenKL` and `PolicyKL` share, and what `Project` works on: policies that are rows of logits."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from step_optim.audit import divergence as statistic
from step_optim.audit.closure import Audit
from step_optim.audit.directed_kl import DirectedKL
from step_optim.audit.rows import Reader, Rows, vocab_blocks
from step_optim.isolation.eval_mode import isolated
from step_optim.movement import Movement

ROWS_AT_ONCE = 32
"""Rows [V] of a mixture that are there at once."""


class LogitKL(DirectedKL):
    """A KL closure whose policies are logit `Rows`: what `Project` needs."""

    has_logits = True

    def _policy(self) -> Rows:
        return self._gather(self._batches(), self._head(live=False))

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
            for name, other in self._others.items():
                other.check_state_dict(self._of(name, state))

    def origin_state(self) -> dict[str, Any]:
        """pi_ref, with the head [V, D] that its hidden states had: a later stage may train one that is frozen now."""
        state, head = self.state_dict(), getattr(self._origin, "head", None)
        if head is not None:
            bias = None if head.bias is None else head.bias.detach()
            state |= {"weight": head.weight.detach(), "bias": bias}
        return state | {name: other.origin_state() for name, other in self._others.items() if name in state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over pi_ref."""
        self.check_state_dict(state)
        if state:
            self._origin, self._penalties = self._loaded(state), int(state.get("penalties", 0))
            for name, other in self._others.items():
                other.load_state_dict(self._of(name, state))

    def _per_prompt(self, rows: Tensor) -> Tensor:
        return statistic.prompt_means(rows, self._prompt_of_row, self.prompts)

    def _movements(self, candidate: Any, *references: Any) -> list[Movement]:
        streamed = statistic.stream_kl(references, candidate, scratch=self._scratch)
        read = self._figures(streamed.kl)
        # The one place where the host waits for the device.
        *figures, doubtful = torch.cat([read.flatten(), streamed.doubtful.any()[None]]).tolist()
        if doubtful:
            figures = self._figures(statistic.settle(streamed, references, candidate)).flatten().tolist()
        each = len(figures) // len(references)
        return [self._movement(figures[j * each : (j + 1) * each]) for j in range(len(references))]

    def _figures(self, rows: Tensor) -> Tensor:
        """KLs of rows, [J, R] -> [J, C + ...]: of prompts, of the prompts in each span, and the largest token's."""
        found = [self._factors * self._per_prompt(rows)]
        for span in self.spans.values():
            found.append(statistic.prompt_means(rows[:, span.rows], span.place, len(span.prompts)))
        tokens = self._factors * rows.reshape(len(rows), -1, self._factors).mean(-1)
        return torch.cat([*found, tokens.amax(1, keepdim=True)], dim=1)

    def _movement(self, figures: Sequence[float]) -> Movement:
        """Read what `_figures` found from one reference."""
        prompts, rest = figures[: self.prompts], iter(figures[self.prompts :])
        spans = {name: [next(rest) for _ in span.prompts] for name, span in self.spans.items()}
        return Movement.over(prompts, self.members, token=next(rest) if self.has_tokens else None, spans=spans)

    def prompt_kl(self, candidate: Audit, strength: Tensor, prompts: Tensor | None = None, of: str = "") -> Tensor:
        """KL of prompts at the mixture (1 - lambda) l_reference + lambda l_candidate, [P] float64 on the CPU.

        Args:
            candidate: the audit of the candidate.
            strength: lambda of each of the prompts, [P].
            prompts: indices [P], which may repeat; all C by default.
            of: "" for the mean over their tokens, "token" for the largest of
                these; or a span, of which each has to have a token.
        """
        chosen = range(self.prompts) if prompts is None else prompts.tolist()
        rows = [self._rows_of(prompt, of) for prompt in chosen]
        place = torch.cat([torch.full_like(part, i) for i, part in enumerate(rows)])
        index = torch.cat(rows).to(self._prompt_of_row.device)
        with torch.no_grad():
            found = statistic.row_kl(
                self._reference[index], candidate.policy[index], strength[place].to(self._prompt_of_row.device)
            )
        return self._reduced_rows(found.cpu(), place, len(rows), of)

    def prompt_drift(self, candidate: Audit, strength: Tensor, prompts: Tensor, of: str = "") -> Tensor:
        """KL(mixture ‖ pi_ref) of prompts, [P] float64 on the CPU; the mixture and the arguments are `prompt_kl`'s."""
        wanted = torch.ones(self.prompts, device="cpu")
        wanted[prompts] = strength.cpu().to(wanted.dtype)
        rows = [self._rows_of(prompt, of) for prompt in prompts.tolist()]
        place = torch.cat([torch.full_like(part, i) for i, part in enumerate(rows)])
        found = []
        for index in torch.cat(rows).to(self._prompt_of_row.device).split(ROWS_AT_ONCE):  # type: ignore[no-untyped-call]
            mixture = Rows(self._mixture(candidate.policy, wanted, index), None)
            found.append(statistic.row_kl(self._origin[index], mixture))
        return self._reduced_rows(torch.cat(found).cpu(), place, len(rows), of)

    def _rows_of(self, prompt: int, of: str) -> Tensor:
        """Rows of a prompt, or those of them that are in a span; on the CPU."""
        rows = (self._prompt_of_row.cpu() == prompt).nonzero().flatten()
        return rows[torch.isin(rows, self.spans[of].rows.cpu())] if of in self.spans else rows

    def _reduced_rows(self, kls: Tensor, place: Tensor, count: int, of: str) -> Tensor:
        """The mean over the rows of each of some prompts, or the largest token of each."""
        if of == "token":
            tokens, first = kls.view(-1, self._factors).sum(1), place[:: self._factors]
            return torch.zeros(count, dtype=kls.dtype, device="cpu").scatter_reduce(0, first, tokens, "amax")
        return (1 if of in self.spans else self._factors) * statistic.prompt_means(kls, place, count)

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
        with isolated(self.modules(), grad=True, watch=self._watch, state=self._state):
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
