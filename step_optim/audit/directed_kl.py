"""DirectedKL: gradients of what audits measure, and the pool that they are drawn from."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from step_optim.audit import divergence as statistic
from step_optim.audit.closure import Audit, Draw, Normal
from step_optim.audit.draws import drawn
from step_optim.audit.gradients import feature_gradients
from step_optim.audit.reduced import set_aside, shards
from step_optim.audit.reference_kl import ReferenceKL
from step_optim.audit.rows import Head, Rows, Scratch
from step_optim.isolation.eval_mode import isolated


class DirectedKL(ReferenceKL):
    """A `ReferenceKL` whose figures have gradients: what `Steer` follows, and what a penalty adds to a loss.

    Directions are taken from a pool of prompts that no audit reads, if there
    is one, for those from the control set fit it.
    """

    has_gradients = True

    pool: DirectedKL | None = None
    """Measures the prompts of the pool."""

    held_out: DirectedKL | None = None
    """Measures prompts that decide nothing."""

    _prompt_of_row: Tensor
    """[R] prompt index of each row."""
    _factors = 1
    """How many rows of a prompt are factors of one action, whose KLs add up: the mean over rows counts so often."""

    def __init__(self) -> None:
        super().__init__()
        self._scratch = Scratch()
        self._penalties = 0
        """How many draws there were for `penalty`."""

    def anchor(self, audit: Audit | None = None) -> None:
        """Take an audited policy, or the current weights, as reference; the first is pi_ref, too, also on the pool."""
        first = self._origin is None
        super().anchor(audit)
        for other in self._others.values() if first else ():
            other.anchor()

    def forget_origin(self) -> None:
        """Let the next reference be pi_ref."""
        super().forget_origin()
        for other in self._others.values():
            other.forget_origin()

    def complete_origin(self) -> None:
        """Read pi_ref where it is known by its weights alone, here and on the pool."""

    def take_origin(self) -> None:
        """Take the policy of the current weights as pi_ref, also on the pool and the held-out prompts."""
        super().take_origin()
        for other in self._others.values():
            other.take_origin()

    @property
    def _others(self) -> dict[str, DirectedKL]:
        """What measures the same policy on other prompts, by its name in a checkpoint."""
        both = {"pool": self.pool, "held_out": self.held_out}
        return {name: other for name, other in both.items() if other is not None}

    @abstractmethod
    def _batches(self) -> Iterable[tuple[Tensor, Tensor]]:
        """Evaluate the current weights batch by batch, in a fixed layout: (which rows, their features [r, D])."""

    def _head(self, *, live: bool) -> Head | None:
        """The head over the features; with ``live`` the one that gradients go to, else one that stays as it is."""
        return None

    def _gather(self, parts: Iterable[tuple[Tensor, Tensor]], head: Head | None) -> Rows:
        """Put the rows of all batches back in their order."""
        x: Tensor | None = None
        for rows, part in parts:
            if x is None:
                x = part.new_empty(len(self._prompt_of_row), part.shape[1])
            x.index_copy_(0, rows, part)
        assert x is not None
        return Rows(x, head)

    def _more_state(self) -> dict[str, Any]:
        """What a checkpoint needs besides pi_ref: that of the pool, and how far its draws are."""
        more: dict[str, Any] = {"penalties": self._penalties} if self._penalties else {}
        return more | {name: other.state_dict() for name, other in self._others.items()}

    @staticmethod
    def _of(name: str, state: Mapping[str, Any]) -> Any:
        """The part of a checkpoint that is the pool's, or the held-out prompts'."""
        if name not in state:
            raise ValueError(
                f"the checkpoint was saved without {name}=, so that what pi_ref says on these prompts is not known any "
                f"more: resume without {name}="
            )
        return state[name]

    def gradients(self, names: Sequence[str], parameters: Sequence[Tensor], draw: Draw | None = None) -> list[Normal]:
        """Measure constraints at the current weights, and their gradients; see `KLClosure.gradients`.

        Each costs a backward pass of those micro-batches that have prompts of its slice.
        """
        source = self if draw is None else self.pool
        assert source is not None
        previous = self._reference if draw is None else draw.previous
        wanted = [source._sum(name, previous, draw) for name in names]
        normals = source._normals(wanted, {"previous": previous, "origin": source._origin}, parameters, draw)
        counts = [source._count(name, draw) for name in names]
        return [replace(normal, count=count) for normal, count in zip(normals, counts, strict=True)]

    def _count(self, name: str, draw: Draw | None) -> int:
        """How many prompts a constraint is the mean over; one, if it is the worst of them."""
        kind, _, part = name.partition(":")
        chosen = range(self.prompts) if draw is None else draw.prompts
        return 1 if kind in ("prompt", "token") else len(set(chosen).intersection(self._prompts_of(part)))

    def _sum(self, name: str, previous: Any, draw: Draw | None) -> tuple[str, Tensor]:
        """What a constraint is the sum of: KLs from which policy, and what each row counts, [R].

        Of a tail, that is the worst prompt or token at the current weights.
        """
        kind, _, part = name.partition(":")
        chosen = list(range(self.prompts) if draw is None else draw.prompts)
        if kind in ("prompt", "token"):
            return "previous", self._worst(kind, previous, chosen, draw)
        return "origin" if kind == "drift" else "previous", self._mean_of(part, chosen)

    def _mean_of(self, part: str, chosen: Sequence[int]) -> Tensor:
        """What each row counts in the mean over some prompts: those of a slice, the tokens in a span, or all."""
        if part in self.spans:
            span = self.spans[part]
            prompts = torch.tensor(span.prompts, dtype=torch.long, device="cpu")
            prompt_of_row = prompts.to(span.place.device)[span.place]
            rows, factors = span.rows, 1
        else:
            prompt_of_row = self._prompt_of_row
            rows, factors = torch.arange(len(prompt_of_row), device=prompt_of_row.device), self._factors
        held = sorted(set(chosen).intersection(self._prompts_of(part)))
        weights = torch.zeros(self.prompts, dtype=torch.float64, device="cpu")
        weights[held] = factors / max(len(held), 1)
        rows_of = torch.bincount(prompt_of_row, minlength=self.prompts)
        counts = torch.zeros(len(self._prompt_of_row), dtype=torch.float64, device=rows_of.device)
        counts[rows] = (weights.to(rows_of.device) / rows_of.clamp_min(1))[prompt_of_row]
        return counts

    def _prompts_of(self, part: str) -> Sequence[int]:
        """The prompts of a slice, those with a token in a span, or all."""
        if part in self.spans:
            return self.spans[part].prompts
        return self.members[part] if part else range(self.prompts)

    def _worst(self, kind: str, previous: Any, chosen: Sequence[int], draw: Draw | None) -> Tensor:
        """What each row counts in the largest KL of a prompt, or of a token, of those that were chosen."""
        drawn = torch.tensor(chosen, device="cpu").to(self._prompt_of_row.device)
        rows = torch.isin(self._prompt_of_row, drawn).nonzero().flatten()
        kls = torch.zeros(len(self._prompt_of_row), dtype=torch.float64, device=rows.device)
        kls[rows] = self._measured(lambda: self._row_kls(previous, rows, draw))
        counts = torch.zeros_like(kls)
        if kind == "prompt":
            means = statistic.prompt_means(kls, self._prompt_of_row, self.prompts)
            own = self._prompt_of_row == means.argmax()
            counts[own] = self._factors / own.sum()
        else:
            counts.view(-1, self._factors)[kls.view(-1, self._factors).sum(1).argmax()] = 1.0
        return counts

    @torch.no_grad()
    def _row_kls(self, previous: Any, rows: Tensor, draw: Draw | None) -> Tensor:
        """KL of some rows of the current weights, those of what was drawn."""
        here = self._policy() if draw is None else self._read(draw)
        return statistic.row_kl(previous[rows], here[rows])

    def _normals(
        self,
        wanted: Sequence[tuple[str, Tensor]],
        policies: Mapping[str, Any],
        parameters: Sequence[Tensor],
        draw: Draw | None,
    ) -> list[Normal]:
        trained = [p for p in parameters if p.requires_grad]
        if not trained:
            raise ValueError("no parameter of the optimizer requires a gradient: there is no direction to steer along")
        if self.reduces_gradients:
            return [self._reduced(kind, counts, policies[kind], parameters, draw) for kind, counts in wanted]
        totals = [0.0] * len(wanted)
        gradients = [{id(p): torch.zeros_like(p) for p in parameters} for _ in wanted]
        with isolated(self.modules(), grad=True, watch=self._watch, state=self._state):
            for rows, x, head in self._graded(draw):
                held = [j for j, (_, counts) in enumerate(wanted) if bool((counts[rows] != 0).any())]
                if not held:
                    continue
                kinds = list(dict.fromkeys(wanted[j][0] for j in held))
                kls, begins = self._row_gradients(Rows(x.detach(), head), [policies[kind][rows] for kind in kinds])
                trains = x.requires_grad  # not where all that the policy reads is frozen for now
                for j in held:
                    kind, counts = wanted[j]
                    kl, begin, weight = kls[kinds.index(kind)], begins[kinds.index(kind)], counts[rows]
                    totals[j] += float((kl * weight).sum())
                    if not trains:
                        continue
                    begin = (begin * weight[:, None].to(begin.dtype)).to(x.dtype)
                    found = torch.autograd.grad(x, trained, begin, retain_graph=j != held[-1], allow_unused=True)
                    for p, g in zip(trained, found, strict=True):
                        if g is not None:
                            gradients[j][id(p)] += g
        return [Normal(total, list(each.values())) for total, each in zip(totals, gradients, strict=True)]

    def _reduced(
        self, kind: str, counts: Tensor, policy: Any, parameters: Sequence[Tensor], draw: Draw | None
    ) -> Normal:
        """One constraint under FSDP2, which reduces the gradients of one backward pass for each forward."""
        (model,) = self.modules()
        quiet = isolated([model], grad=True, watch=self._watch, state=self._state)
        with quiet, set_aside(model, parameters):
            return Normal(self._backward(counts, policy, draw), shards(parameters))

    def _backward(self, counts: Tensor, policy: Any, draw: Draw | None) -> float:
        """Add the gradient of a constraint to `.grad`, and return its value."""
        total = 0.0
        for rows, x, head in self._graded(draw):  # in every process as often: they wait for each other
            kls, (begin,) = self._row_gradients(Rows(x.detach(), head), [policy[rows]])
            total += float((kls[0] * counts[rows]).sum())
            if x.requires_grad:  # not where all that the policy reads is frozen for now
                torch.autograd.backward(x, (begin * counts[rows, None].to(begin.dtype)).to(x.dtype))
        return total

    def _graded(self, draw: Draw | None) -> Iterator[tuple[Tensor, Tensor, Head | None]]:
        """Evaluate prompts batch by batch, with a graph: features and their head if that is frozen, else logits."""
        head = self._head(live=True)
        trained = head is not None and any(p is not None and p.requires_grad for p in (head.weight, head.bias))
        for rows, x in self._drawn(draw):
            yield (rows, Rows(x, head).logits(), None) if trained else (rows, x, head)

    def _drawn(self, draw: Draw | None) -> Iterable[tuple[Tensor, Tensor]]:
        """`_batches` of the prompts that were drawn, or of all; rows of others may come along, and count nothing."""
        return self._batches()

    def penalty(self, prompts: int = 4) -> Tensor:
        """Return the drift from pi_ref on a few prompts, with a graph: a KL penalty for the user's own loss.

        The prompts are drawn from the pool (from the control set if there is
        none), others at every call. Until the first step, or the first call,
        pi_ref is the policy as it is. The forward runs in eval mode; the
        backward pass is the user's, so a model that recomputes activations in
        eval mode (checkpointing) must not have dropout.

        Args:
            prompts: how many are drawn.

        Returns:
            KL(current ‖ pi_ref), mean over the prompts of the means over their tokens [nats per token], 0-dim.

        >>> from step_optim import PolicyKL
        >>> policy = torch.nn.Linear(2, 3)
        >>> kl = PolicyKL(lambda: policy(torch.eye(2)))
        >>> kl.penalty(prompts=1).item()
        0.0
        """
        if prompts < 1:
            raise ValueError(f"prompts={prompts} must be at least 1")
        source = self.pool or self
        if source._origin is None:
            source.anchor()
        chosen = drawn(range(source.prompts), list(source.members.values()), prompts, self._penalties)
        self._penalties += 1
        return source._drift(Draw(tuple(chosen)))

    def _drift(self, draw: Draw) -> Tensor:
        """The drift on what was drawn, with a graph: its value, and a linear function that has its gradient."""
        counts = self._mean_of("", draw.prompts)
        value, linear = 0.0, torch.zeros((), device=counts.device)
        with isolated(self.modules(), grad=True, watch=self._watch, state=self._state):
            for rows, x, head in self._graded(draw):
                kls, (begin,) = self._row_gradients(Rows(x.detach(), head), [self._origin[rows]])
                value += float((kls[0] * counts[rows]).sum())
                begin = (begin * counts[rows, None].to(begin.dtype)).to(x.dtype)
                linear = linear + torch.where(begin == 0, 0.0, x * begin).sum().float()  # masked logits are -inf
        return value + (linear - linear.detach())

    @torch.no_grad()
    def _row_gradients(self, here: Rows, references: Sequence[Rows]) -> tuple[Tensor, list[Tensor]]:
        """KL of each row, [J, R], and its derivatives with respect to the features, J tensors [R, D]."""
        streamed = statistic.stream_kl(references, here, scratch=self._scratch)
        kls = statistic.settle(streamed, references, here)
        return kls, feature_gradients(references, here, streamed, self._scratch)

    def draw(self, count: int, turn: int, names: Sequence[str]) -> Draw | None:
        """Draw prompts from the pool, each as often as the others in the long run; see `KLClosure.draw`.

        Where a constraint is on the step, the weights have to be theta_t.
        """
        pool = self.pool
        if pool is None:
            return None
        missing = [name for name in names if name.partition(":")[2] not in ("", *pool.slices)]
        if missing:
            raise ValueError(
                f"the pool has no prompts of the slice in {missing[0]!r}, only of {sorted(pool.slices)}: give it "
                "some, under that name"
            )
        parts = [name.partition(":")[2] for name in names]
        asked = [pool._prompts_of(part) for part in parts if part]
        open_ = range(pool.prompts) if "" in parts else sorted({i for members in asked for i in members})
        chosen = drawn(open_, list(pool.members.values()), count, turn)
        for members in asked:
            if not set(members) & set(chosen):  # a small slice of a large pool
                chosen.append(members[turn % len(members)])
        draw = Draw(tuple(chosen))
        moves = any(not name.startswith("drift") for name in names)
        return replace(draw, previous=pool._measured(lambda: pool._read(draw))) if moves else draw

    def _read(self, draw: Draw) -> Any:
        """The policy of the current weights on what was drawn; other rows are left out."""
        return self._gather(self._drawn(draw), self._head(live=False))
