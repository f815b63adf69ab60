"""PolicyKL: movement of any policy that is a function of the weights: PPO on Gymnasium, bandits, classifiers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from step_optim.audit.closure import Draw, Normal
from step_optim.audit.distributions import Kept, same_constants
from step_optim.audit.draws import checked_every
from step_optim.audit.moving import MovingKL
from step_optim.audit.observations import Observed
from step_optim.audit.parameters import tensors_of
from step_optim.audit.policy_noise import AtRest
from step_optim.audit.policy_output import Output, same_mask, with_rows
from step_optim.audit.reference_kl import Incomparable
from step_optim.audit.rows import Rows
from step_optim.control.control_set import checked_slices
from step_optim.host.modules import has_fsdp
from step_optim.isolation.eval_mode import isolated
from step_optim.movement import Movement

REDUCTIONS = (None, "sum", "mean")


class PolicyKL(MovingKL):
    """KL between the action distributions of the current weights and those before the step.

    Each of the N control observations counts as one prompt. Categorical
    policies are kept as rows of logits, and can be projected; of others the
    parameters are kept in float64. For every class that has a closed form in
    torch.distributions, also inside `Independent` and bijective transforms, a
    figure is good to 1e-5 of itself from 1e-10 nats on (`closed_forms`).

    The function is called once here, to learn what it returns, and some eight
    times more to measure what an audit reads at rest and of weights that moved
    next to nothing (``noise_floor=False`` leaves that out).

    Args:
        fn: takes nothing, or the ``observations``; returns logits [N, A], or a
            `torch.distributions.Distribution` with batch shape [N, ...], at the
            current weights on the N observations. With a ``reduction``,
            logits may be of several parts, [N, T, A].
        slices: observation indices, or a boolean mask [N], by slice name; or
            one label per observation.
        model: the module behind ``fn``. Needed only if ``fn`` calls its
            methods rather than ``model(...)`` and it has dropout or BatchNorm;
            and under FSDP2, if steps are steered.
        reduction: what becomes of the batch dimensions behind the first: their
            KLs are factors of one action and add up, ``"sum"``; or they are
            tokens of one text, and their ``"mean"`` is taken. Dimensions inside
            `Independent` always add up. By default the sum, with a warning
            where it may be meant otherwise: a Categorical [N, T].
        noise_floor: whether to check that unmoved weights read 0, and to
            measure `noise_floor`: of the trained weights of the modules that
            ``fn`` calls; None if it calls none, or FSDP2 has split them.
        pool: a function like ``fn`` on other observations, which no audit
            reads: `Steer` draws directions from them. A `PolicyKL` of it, if
            they are in slices, or have a mask.
        held_out: a function like ``fn``, or a `PolicyKL` of one, on further
            observations, which are measured and decide nothing; see `TokenKL`.
        every: steps from one held-out measurement to the next, 10 by default.
        mask: which tokens count, bool [N, T]; the mean is over these. Padding
            does not count.
        observations: what ``fn`` is given: a tensor or an array [N, ...], or a
            nested dict, tuple or list of these (action masks and recurrent
            states too). They are copied. `observe` renews them, before each
            update say; ``pool`` and ``held_out`` are then a `PolicyKL` each.
        drift: what becomes of pi_ref when they are renewed; see `observe`. To
            ``"keep"`` it takes a copy of the weights and buffers of the modules
            that ``fn`` calls, kept from the first step on (the pool and the
            held-out set have one each).

    Raises:
        TypeError: ``fn`` is not callable, or returns neither logits nor a
            distribution whose KL has a closed form.
        ValueError: other shapes than these; a single action, which cannot
            move; an unknown ``reduction``; transforms that are trained; unmoved
            weights that do not read 0 (dropout in eval mode, say).

    ``fn`` must be a function of the weights and of what it is given alone.
    After changing observations that it closes over, call
    ``optimizer.refresh(restart_drift=True)``.

    >>> policy = nn.Linear(3, 2)
    >>> kl = PolicyKL(lambda: policy(torch.eye(3)), slices={"left": [0], "right": [1, 2]})
    >>> kl.anchor(); kl().mean
    0.0
    """

    def __init__(
        self,
        fn: Callable[..., Tensor | Distribution],
        slices: Mapping[str, Sequence[int]] | Sequence[Any] | None = None,
        *,
        model: nn.Module | None = None,
        reduction: str | None = None,
        noise_floor: bool = True,
        pool: Callable[[], Tensor | Distribution] | PolicyKL | None = None,
        held_out: Callable[[], Tensor | Distribution] | PolicyKL | None = None,
        every: int | None = None,
        mask: Tensor | None = None,
        observations: Any = None,
        drift: str | None = None,
    ) -> None:
        observed = None if observations is None else Observed(fn, observations)
        super().__init__(observed, drift)
        if not callable(fn):
            raise TypeError(f"fn={fn!r:.60} is not callable; pass a function that returns logits or a Distribution")
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction={reduction!r} is unknown; use 'sum', 'mean' or None")
        self.fn: Callable[[], Any] = observed or fn
        self._model, self._reduction, self._mask = model, reduction, None
        self._differentiable: bool | None = None
        output, policy = self._measured(self._first)
        output.check_choices()
        if reduction is None and output.may_be_tokens:
            self._warn_of_sum(output)
        self._kind, self.has_logits = output.kind, isinstance(policy, Rows)
        count = output.batch_shape[0]
        self._check_observed(count, mask)
        self._parts, self._averaged = output.parts, output.beside if reduction == "mean" else 1
        self._factors = self._parts // self._averaged
        self._device = policy.x.device if isinstance(policy, Rows) else policy.device
        self._mask = output.checked_mask(mask, reduction)
        given: Any = {} if slices is None else slices
        self._lay_out(count, checked_slices(given, count))
        self._constants: tuple[Any, ...] | None = () if isinstance(policy, Rows) else policy.constants
        self._check_transforms()
        if noise_floor:
            self._state.examine()  # what forwards write is perhaps nothing while an adapter is 0
            self.noise_floor = self._measured(self._at_rest.noise_floor)
        if drift == "keep":
            self._check_keeps(self._measured(self._reads_beside))
        self.every = checked_every(every, held_out=held_out is not None)
        if pool is not None and pool is held_out:
            raise ValueError("pool and held_out are one object; held-out observations have to be others")
        if pool is not None:
            self.pool = self._elsewhere("pool", pool)
        if held_out is not None:
            self.held_out = self._elsewhere("held_out", held_out)

    def _check_observed(self, count: int, mask: Tensor | None) -> None:
        if self._observed is None:
            return
        if self._observed.count != count:
            raise ValueError(
                f"fn returned {count} observations for the {self._observed.count} that it was given; its first "
                "dimension must be theirs"
            )
        if mask is not None:
            raise ValueError(
                "mask= is fixed, and observations= may be renewed: have fn return only the tokens that count, each as "
                "an observation of its own; or leave out observations= and bind another PolicyKL for each rollout"
            )

    def _lay_out(self, count: int, members: Mapping[str, tuple[int, ...]]) -> None:
        self.prompts, self.members = count, members
        self._constants = None
        prompt_of_row = torch.arange(count, device=self._device).repeat_interleave(self._parts)
        self._prompt_of_row = prompt_of_row if self._mask is None else prompt_of_row[self._mask]

    @property
    def reduces_gradients(self) -> bool:  # type: ignore[override]
        """Whether FSDP2 shards the ``model`` that was given."""
        return self._model is not None and has_fsdp(self._model)

    @property
    def has_gradients(self) -> bool:  # type: ignore[override]
        """Whether fn returns tensors with a graph; it is called to find out, once."""
        if self._differentiable is None:
            with isolated(self.modules(), grad=True, watch=self._watch, state=self._state):
                out = self.fn()
                self._differentiable = any(tensor.requires_grad for tensor in tensors_of(out).values())
        return self._differentiable

    def _elsewhere(self, name: str, other: Callable[[], Any] | PolicyKL) -> PolicyKL:
        """Read the argument ``pool=`` or ``held_out=``."""
        if not isinstance(other, PolicyKL):
            if self._observed is not None:
                raise TypeError(
                    f"{name}={other!r:.60} has no observations of its own; give {name}=PolicyKL(fn, observations=...)"
                )
            if not callable(other):
                raise TypeError(f"{name}={other!r:.60} is neither a function like fn nor a PolicyKL of one")
            if self._mask is not None:
                raise ValueError(
                    f"mask= says which of fn's tokens count, and not which of {name}'s; give {name}=PolicyKL(function, "
                    "reduction='mean', mask=its mask)"
                )
            other = PolicyKL(other, model=self._model, reduction=self._reduction, noise_floor=False)
        other.forget_origin()  # of another run
        if other._observed is not None and other._after_renewal != self._after_renewal:
            raise ValueError(
                f"{name} was made with drift={other._after_renewal!r}, and this closure with {self._after_renewal!r}: "
                "all are measured from one pi_ref; give both the same"
            )
        if other._kind[0] != self._kind[0]:
            raise ValueError(f"{name} returns {other._kind[0]}, fn {self._kind[0]}: give both the same kind of policy")
        return other

    def _first(self) -> tuple[Output, Rows | Kept]:
        output = self._evaluate()
        return output, output.keep()

    def _warn_of_sum(self, output: Output) -> None:
        warnings.warn(
            f"fn returned {output.name} of batch shape {output.batch_shape}: the KLs of the {output.beside} parts of "
            "an observation are added up, as those of the factors of one action. If that is meant, say so with "
            "PolicyKL(..., reduction='sum'); if the parts are the tokens of a text, give reduction='mean'",
            stacklevel=3,
        )

    def _check_transforms(self) -> None:
        """Refuse transforms that are trained. Only a graph tells of those that are made of bare parameters."""
        if any(isinstance(fact, Tensor) for fact in self._constants or ()):
            with isolated(self.modules(), grad=True):
                leaf = self._evaluate().leaf
                if leaf is not None and leaf.trains_transforms:
                    raise self._moving_transforms()

    def _moving_transforms(self) -> ValueError:
        return ValueError(
            f"the transforms of fn's {self._kind[0]} move with the weights: a KL of theirs has no closed form. Let the "
            "base distribution have what is trained, Normal(loc, scale) say, and give it constant transforms"
        )

    def modules(self) -> Iterable[nn.Module]:
        """Return the model, if it is known."""
        return () if self._model is None else (self._model,)

    def describe(self) -> dict[str, Any]:
        """What is measured, what becomes of the parts of an observation, and the noise floor."""
        return {
            "policy": self._kind[0],
            "observations": self.prompts,
            "figure": f"{self._figure} of an observation",
            "noise_floor": None if self.noise_floor is None else self.noise_floor.to_dict(),
        }

    @property
    def _figure(self) -> str:
        """What one observation's figure is."""
        several = self._factors > 1
        if self._averaged == 1:
            return f"sum of {self._factors} KLs" if several else "KL"
        return (
            f"mean over {self._averaged} sums of {self._factors} KLs"
            if several
            else f"mean over {'' if self._mask is None else 'up to '}{self._averaged} KLs"
        )

    def _evaluate(self) -> Output:
        self._state.reset()
        return Output.of(self.fn(), several=self._reduction is not None)

    def _policy(self) -> Any:
        return self._kept(self._evaluate())

    def _kept(self, output: Output) -> Rows | Kept:
        if output.batch_shape[0] != self.prompts:
            wanted = "at first; keep them fixed" if self._observed is None else "were given"
            raise Incomparable(f"fn returned {output.batch_shape[0]} observations, {self.prompts} {wanted}")
        if output.kind != self._kind:
            shapes = f"{output.kind[0]} {output.kind[1:]}, {self._kind[0]} {self._kind[1:]} at first"
            raise ValueError(f"fn returned {shapes} (batch shape, parts, actions); keep class and shape fixed")
        policy = output.keep(self._mask)
        if isinstance(policy, Rows):
            return policy
        self._constants = policy.constants if self._constants is None else self._constants
        if not same_constants(policy.constants, self._constants):
            raise self._moving_transforms()
        return policy

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        rows = self._evaluate().rows(self._mask)
        yield torch.arange(len(rows), device=rows.device), rows

    def _read(self, draw: Draw) -> Any:
        return self._policy()

    def _normals(
        self,
        wanted: Sequence[tuple[str, Tensor]],
        policies: Mapping[str, Any],
        parameters: Sequence[Tensor],
        draw: Draw | None,
    ) -> list[Normal]:
        if self.has_logits or self.reduces_gradients:
            return super()._normals(wanted, policies, parameters, draw)
        with isolated(self.modules(), grad=True, watch=self._watch, state=self._state):
            return [Normal.of(self._live_kl(policies[kind], counts), parameters) for kind, counts in wanted]

    def _backward(self, counts: Tensor, policy: Any, draw: Draw | None) -> float:
        if self.has_logits:
            return super()._backward(counts, policy, draw)
        value = self._live_kl(policy, counts)
        if value.requires_grad:
            torch.autograd.backward(value)
        return float(value.detach())

    def _live_kl(self, reference: Any, counts: Tensor) -> Tensor:
        """A weighted sum of the observations' KLs from a reference, with a graph; the policy is no categorical one."""
        leaf = self._evaluate().leaf
        assert leaf is not None
        tokens = leaf.kl(reference).reshape(self.prompts, self._averaged, -1).sum(-1)
        return (tokens * counts.reshape(*tokens.shape, -1).sum(-1) / self._factors).sum()

    def _worst(self, kind: str, previous: Any, chosen: Sequence[int], draw: Draw | None) -> Tensor:
        if self.has_logits:
            return super()._worst(kind, previous, chosen, draw)
        with torch.no_grad():
            kls = self._measured(self._policy).kl(previous).reshape(self.prompts, self._averaged, -1).sum(-1)
        kls = kls if kind == "token" else kls.mean(1, keepdim=True)
        place = list(chosen)
        worst = divmod(int(kls[place].argmax()), kls.shape[1])
        counts = torch.zeros(self.prompts, self._averaged, self._factors, dtype=torch.float64, device=kls.device)
        if kind == "token":
            counts[place[worst[0]], worst[1]] = 1.0
        else:
            counts[place[worst[0]]] = 1 / self._averaged
        return counts.flatten()

    def _drift(self, draw: Draw) -> Tensor:
        if self.has_logits:
            return super()._drift(draw)
        counts = self._mean_of("", draw.prompts)
        with isolated(self.modules(), grad=True, watch=self._watch, state=self._state):
            return self._live_kl(self._origin, counts)

    @property
    def has_tokens(self) -> bool:  # type: ignore[override]
        """Whether the parts of an observation are tokens, whose mean is taken."""
        return self._averaged > 1

    def _movements(self, candidate: Any, *references: Any) -> list[Movement]:
        if isinstance(candidate, Rows):
            return super()._movements(candidate, *references)
        return [self._moved(candidate.kl(reference)) for reference in references]

    def _moved(self, kls: Tensor) -> Movement:
        """Of the KLs of all parts of all observations."""
        tokens = kls.reshape(self.prompts, self._averaged, -1).sum(-1)
        token = float(tokens.max()) if self.has_tokens else None
        return Movement.over(tokens.mean(1).tolist(), self.members, token=token)

    @property
    def _at_rest(self) -> AtRest:
        def movement(now: Any, before: Any) -> Movement:
            return self._movements(now, before)[0]

        return AtRest(self.fn, self._evaluate, self._kept, movement, lambda: self.used)

    def _reads_beside(self) -> bool:
        self._evaluate()  # finds the modules
        return self._at_rest.reads_beside([p for module in self.used for p in module.parameters(recurse=False)])

    def _origin_state(self) -> dict[str, Any]:
        """Rows of logits, or the tensors of its distribution by attribute path."""
        if isinstance(self._origin, Rows):
            return {"x": self._origin.x} | ({} if self._mask is None else {"mask": self._mask})
        return {"tensors": {path: t.clone() for path, t in self._origin.tensors.items()}}

    def _read_origin(self, state: Mapping[str, Any]) -> Any:
        if self._after_renewal == "keep" or "weights" in state:
            return self._loaded_first(state)
        with isolated(self.modules()):
            output = self._evaluate()
            now = self._kept(output)
        wanted = {"x": now.x} if isinstance(now, Rows) else now.tensors
        saved = {"x": state["x"]} if "x" in state else with_rows(state["tensors"], output)
        if any(name not in saved or saved[name].shape != tensor.shape for name, tensor in wanted.items()):
            raise ValueError(
                f"the checkpoint's pi_ref does not have the shape of this policy over {self.prompts} observations; "
                "resume with the observations of the run that saved it"
            )
        if not isinstance(now, Rows):
            return now.with_tensors(saved)
        if not same_mask(state.get("mask"), self._mask):
            raise ValueError(
                "the checkpoint's pi_ref counts other tokens: resume with the mask= of the run that saved it"
            )
        wide = torch.promote_types(now.x.dtype, torch.float32)  # older versions kept float32 logits as float64
        return Rows(saved["x"].to(now.x.device, wide))

    def __repr__(self) -> str:
        kind = "logits" if self.has_logits else "distribution"
        return f"PolicyKL({self.prompts} observations, {kind}, slices={list(self.members)})"
