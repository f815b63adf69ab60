"""KL closures: what measures how far the current weights are from the policy before the step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from step_optim.audit.noise import NoiseFloor
from step_optim.isolation.eval_mode import isolated
from step_optim.isolation.module_state import ModuleState
from step_optim.movement import Movement

F = TypeVar("F", bound=Callable[[], Any])


@dataclass(frozen=True)
class Audit:
    """One measurement: the movement, and the policy that was measured (opaque; None if it is not kept)."""

    movement: Movement
    policy: Any = None
    drift: Movement | None = None
    """Movement of that policy from pi_ref, if it was measured along with it."""


@dataclass(frozen=True)
class Draw:
    """Prompts from a pool, on which directions are measured."""

    prompts: tuple[int, ...]
    """Indices into the pool."""
    previous: Any = None
    """The policy of theta_t on the pool's prompts; None if it is not needed."""


@dataclass(frozen=True)
class Normal:
    """A constraint's value at some weights, and its gradient: a normal of the surface on which it is constant."""

    value: float
    """[nats per token], on the prompts that it was measured on."""
    gradient: list[Tensor]
    """A tensor for each parameter."""
    count: int = 1
    """How many prompts it is the mean over, in this process."""

    @staticmethod
    def of(total: Tensor, parameters: Sequence[Tensor], *, again: bool = False) -> Normal:
        """Differentiate one figure; 0 of parameters that it does not depend on.

        Args:
            total: the figure, with its graph.
            parameters: what to differentiate with respect to.
            again: whether the graph is used once more.
        """
        trained = [p for p in parameters if p.requires_grad]
        parts = torch.autograd.grad(total, trained, retain_graph=again, allow_unused=True)
        by_id = {id(p): g for p, g in zip(trained, parts, strict=True) if g is not None}
        return Normal(float(total.detach()), [by_id.get(id(p), torch.zeros_like(p)) for p in parameters])


class KLClosure(ABC):
    """Measures the movement of the *current* weights from the policy before the step.

    Subclass it, or pass any function without arguments: a function is wrapped
    in `FunctionKL`. A closure that owns its reference makes a committed step
    cost one evaluation instead of two: `anchor(audit)` is told which audited
    policy was committed, and the next step is measured from there.
    """

    has_logits = False
    """Whether `Project` can work with this closure: it derives from `LogitKL`."""

    has_gradients = False
    """Whether `gradients` returns some: what `Steer` follows."""

    reduces_gradients = False
    """Whether `gradients` returns this process's shards of them where FSDP2 has split the weights."""

    isolates = False
    """Whether `audit` runs itself isolated; if not, `Auditor.audit` does that."""

    sharded = False
    """Whether each process measures a part of the control prompts only (see `Movement.pooled`)."""

    noise_floor: NoiseFloor | None = None
    """What rounding alone reads; None if it was not measured."""

    takes_any_weights = False
    """Whether `audit` copes with weights that are not finite: it may then run before anybody has looked at them."""

    opaque = False
    """Whether it runs a function of the user's, which owns its reference and may write into weights."""

    held_out: KLClosure | None = None
    """Measures prompts that decide nothing, at every n-th step; None if there are none."""

    every: int = 1
    """How often, in steps, held-out prompts are measured."""

    renewals: int = 0
    """How often observations were renewed: the reference, and perhaps pi_ref, are over other ones since."""

    restarts_unasked = False
    """Whether such a renewal makes another policy pi_ref, and nobody said that it should."""

    used: Sequence[nn.Module] = ()
    """Modules that the latest measurement called. Their buffers are part of the policy, and roll back with it."""

    @property
    def slices(self) -> tuple[str, ...] | None:
        """Names of the slices; None if they are not known before a measurement."""
        return None

    @property
    def replica(self) -> Hashable:
        """What is equal in all processes that measure the same prompts as this one; None if that is not known."""
        return None

    @property
    def counts(self) -> Mapping[str, int] | None:
        """How many prompts each figure is over: ``"mean"`` and the slices; None if that is not known."""
        return None

    @property
    def noise_remedy(self) -> str:
        """What would make `noise_floor` smaller, for a message; empty if nothing is known to."""
        return ""

    def describe(self) -> dict[str, Any]:
        """What a log should say in its first line about how this measures; plain values."""
        return {}

    @abstractmethod
    def audit(self) -> Audit:
        """Measure the current weights."""

    def audit_with_drift(self) -> Audit:
        """Measure the current weights; from pi_ref too, if that is cheaper now than later."""
        return self.audit()

    def __call__(self) -> Movement:
        """Measure the current weights and return the figures alone."""
        return self.audit().movement

    def anchor(self, audit: Audit | None = None) -> None:
        """Make an audited policy the reference; without one, evaluate the current weights."""

    def gradients(self, names: Sequence[str], parameters: Sequence[Tensor], draw: Draw | None = None) -> list[Normal]:
        """Measure constraints at the current weights, and their gradients.

        Args:
            names: ``"mean"``, ``"slice:<name>"``, ``"prompt"``, ``"token"``, ``"drift"``, ``"drift:<name>"``, as in
                `Verdict.ratios`.
            parameters: what to differentiate with respect to.
            draw: the prompts to measure on; by default those that audits measure on.

        Raises:
            NotImplementedError: this closure has none; see `has_gradients`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no gradients")

    def draw(self, count: int, turn: int, names: Sequence[str]) -> Draw | None:
        """Draw prompts from the pool; None if there is no pool.

        Args:
            count: how many, at least one of each slice that is asked for.
            turn: how many draws there were before; the same turn draws the same prompts, in every process.
            names: the constraints that are to be measured on them.
        """
        return None

    def drift(self, audit: Audit | None = None) -> Movement | None:
        """Movement of an audited policy (default: the reference) from pi_ref; None if this closure has no pi_ref."""
        return None

    def forget_origin(self) -> None:
        """Let the next reference be pi_ref."""

    def take_origin(self) -> None:
        """Take the policy of the current weights as pi_ref; the reference stays what it is.

        Raises:
            NotImplementedError: this closure has no pi_ref.
        """
        raise NotImplementedError(f"{type(self).__name__} has no pi_ref")

    def take_origin_from(self, other: KLClosure) -> bool:
        """Take what another closure's pi_ref says on the prompts of this one; whether it is known there."""
        return False

    def forget_attributes(self) -> None:
        """Read modules with the attributes that they have at the next measurement, and from then on."""

    def fingerprint(self, own: Collection[int] = ()) -> Any:
        """Changes when weights that the measurement reads were written; what it cannot see needs `refresh`.

        Args:
            own: ids of the parameters that the caller watches itself.
        """
        return None

    def hold(self) -> None:
        """A step begins: what is measured on has to stay as it is until `release`."""

    def release(self) -> None:
        """Let go of what only serves a step in progress: the step has ended."""

    @property
    def has_origin(self) -> bool:
        """Whether it has a pi_ref already, from which `drift` is measured."""
        return False

    @property
    def measures_drift(self) -> bool:
        """Whether `drift` returns figures."""
        return False

    def modules(self) -> Iterable[nn.Module]:
        """Modules whose weights and buffers the measurement reads, as far as they are known."""
        return ()

    def check_parameters(self, parameters: Sequence[Tensor]) -> None:
        """Refuse an optimizer whose parameters this closure does not read."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: plain values and tensors."""
        return {}

    def origin_state(self) -> dict[str, Any]:
        """What `load_state_dict` has to be given later to know pi_ref, whatever is trained until then."""
        return self.state_dict()

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """Refuse a state that does not belong to this closure, before anything has changed."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""


class FunctionKL(KLClosure):
    """A plain function as KL closure.

    Args:
        fn: takes nothing; returns the movement of the current weights from
            the weights before the step, as `Movement.of` reads it. It owns its
            reference: take it before `step()`.
    """

    isolates = True
    opaque = True

    def __init__(self, fn: Callable[[], Any]) -> None:
        if not callable(fn):
            raise TypeError(f"kl={fn!r} is not callable; pass TokenKL, PolicyKL or a function without arguments")
        self.fn, self._state = fn, ModuleState(resets=False)
        self._differentiable: bool | None = None

    @property
    def has_gradients(self) -> bool:  # type: ignore[override]
        """Whether the function returns tensors with a graph; it is called to find out, once."""
        if self._differentiable is None:
            with isolated(state=self._state, grad=True) as self.used:
                found = _by_name(self.fn())
            self._state.refuse()
            self._differentiable = all(isinstance(kl, Tensor) and kl.requires_grad for kl in found.values())
        return self._differentiable

    def gradients(self, names: Sequence[str], parameters: Sequence[Tensor], draw: Draw | None = None) -> list[Normal]:
        """Differentiate what the function returned; see `KLClosure.gradients`."""
        normals = []
        with isolated(state=self._state, grad=True) as self.used:
            found = _by_name(self.fn())
            for name in names:
                kl = found[name]
                if not (isinstance(kl, Tensor) and kl.requires_grad):
                    raise NotImplementedError(f"the KL function's figure for {name!r} has no graph")
                normals.append(Normal.of(kl.sum(), parameters, again=name != names[-1]))
        self._state.refuse()
        return normals

    def audit(self) -> Audit:
        """Call the function, isolated, and read what it returned."""
        with isolated(state=self._state) as self.used:
            moved = Movement.of(self.fn())
        self._state.refuse()
        return Audit(moved)

    def __repr__(self) -> str:
        return f"FunctionKL({getattr(self.fn, '__qualname__', self.fn)})"


def _by_name(value: Any) -> dict[str, Any]:
    """What a function returned, by the names of the constraints; see `Movement.of`."""
    if isinstance(value, Movement):
        return {"mean": value.mean} | {f"slice:{name}": kl for name, kl in value.slices.items()}
    if not isinstance(value, Mapping):
        return {"mean": value}
    found = {"mean" if name == "mean" else f"slice:{name}": kl for name, kl in value.items()}
    if "mean" not in found and found:
        total: Any = sum(found.values())
        found["mean"] = total / len(found)
    return found


def kl_closure(fn: F) -> FunctionKL:
    """Mark a function as KL closure, so that ``optimizer.step(fn)`` takes it as one.

    A plain function in that place is always torch's loss closure.

    >>> @kl_closure
    ... def movement():
    ...     return {"math": 0.01, "story": 0.03}
    >>> movement().mean, movement().worst
    (0.02, ('story', 0.03))
    """
    return FunctionKL(fn)


def as_kl(kl: KLClosure | Callable[[], Any]) -> KLClosure:
    """Read the argument ``kl=``."""
    return kl if isinstance(kl, KLClosure) else FunctionKL(kl)


class Unbound(KLClosure):
    """There is no KL closure yet. A step that moves nothing may go on: checkpointing makes some to create state."""

    def audit(self) -> Audit:
        """Refuse: nothing would be measured."""
        raise RuntimeError(
            "STEPOptimizer has no KL closure: nothing would be measured. Pass kl= to the constructor or to step(), "
            "or call bind(kl) once the model is wrapped"
        )
