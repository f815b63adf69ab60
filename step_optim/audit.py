"""KL closures: what measures how far the current weights are from the policy before the step."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from step_optim.fingerprint import fingerprint
from step_optim.host.modules import has_fsdp
from step_optim.isolation.eval_mode import isolated
from step_optim.isolation.module_state import ModuleState
from step_optim.movement import Movement
from step_optim.noise import NoiseFloor

F = TypeVar("F", bound=Callable[[], Any])
T = TypeVar("T")

READINGS = 3
"""Readings at most until no forward writes anything that is not known yet."""


class Incomparable(ValueError):
    """The policy is over other observations than its reference: there is no movement between the two."""


@dataclass(frozen=True)
class Audit:
    """One measurement: the movement, and the policy that was measured (opaque; None if it is not kept)."""

    movement: Movement
    policy: Any = None
    drift: Movement | None = None
    """Movement of that policy from pi_ref, if it was measured along with it."""


class KLClosure(ABC):
    """Measures the movement of the *current* weights from the policy before the step.

    Subclass it, or pass any function without arguments: a function is wrapped
    in `FunctionKL`. A closure that owns its reference makes a committed step
    cost one evaluation instead of two: `anchor(audit)` is told which audited
    policy was committed, and the next step is measured from there.
    """

    has_logits = False
    """Whether `Project` can work with this closure: it derives from `LogitKL`."""

    isolates = False
    """Whether `audit` runs itself isolated; if not, the transaction does that."""

    sharded = False
    """Whether each process measures a part of the control prompts only (see `Movement.pooled`)."""

    noise_floor: NoiseFloor | None = None
    """What rounding alone reads; None if it was not measured."""

    takes_any_weights = False
    """Whether `audit` copes with weights that are not finite: it may then run before anybody has looked at them."""

    used: Sequence[nn.Module] = ()
    """Modules that the latest measurement called. Their buffers are part of the policy, and roll back with it."""

    @property
    def slices(self) -> tuple[str, ...] | None:
        """Names of the slices; None if they are not known before a measurement."""
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

    def drift(self, audit: Audit | None = None) -> Movement | None:
        """Movement of an audited policy (default: the reference) from pi_ref; None if this closure has no pi_ref."""
        return None

    def forget_origin(self) -> None:
        """Let the next reference be pi_ref."""

    def forget_attributes(self) -> None:
        """Read modules with the attributes that they have at the next measurement, and from then on."""

    def fingerprint(self, own: Collection[int] = ()) -> Any:
        """Changes when weights that the measurement reads were written; what it cannot see needs `refresh`.

        Args:
            own: ids of the parameters that the caller watches itself.
        """
        return None

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

    def __init__(self, fn: Callable[[], Any]) -> None:
        if not callable(fn):
            raise TypeError(f"kl={fn!r} is not callable; pass TokenKL, PolicyKL or a function without arguments")
        self.fn, self._state = fn, ModuleState(resets=False)

    def audit(self) -> Audit:
        """Call the function, isolated, and read what it returned."""
        with isolated(state=self._state) as self.used:
            moved = Movement.of(self.fn())
        self._state.refuse()
        return Audit(moved)

    def __repr__(self) -> str:
        return f"FunctionKL({getattr(self.fn, '__qualname__', self.fn)})"


def kl_closure(fn: F) -> FunctionKL:
    """Mark a function as KL closure, so that ``optimizer.step(fn)`` takes it as one.

    A plain function in that place is always torch's loss closure.
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


class ReferenceKL(KLClosure):
    """A KL closure that owns its reference: a policy that was evaluated, kept, and is compared with.

    Subclasses evaluate (`_policy`) and compare (`_prompt_kls`); what a policy is
    stays theirs. pi_ref is the first reference that was ever taken.
    """

    isolates = True

    members: Mapping[str, tuple[int, ...]]
    """Prompt indices of each slice."""

    def __init__(self) -> None:
        self._reference: Any = None
        self._origin: Any = None
        self._state = ModuleState()
        self._told: set[tuple[nn.Module, str]] = set()
        """Attributes that forwards left behind, and what they make of a reading was told."""
        self._watch = True
        """Whether measurements may call modules that are not among `modules`."""

    @abstractmethod
    def _policy(self) -> Any:
        """Evaluate the current weights; called isolated."""

    @abstractmethod
    def _prompt_kls(self, candidate: Any, references: Sequence[Any]) -> list[list[float]]:
        """KL(candidate ‖ reference) of each control prompt [C], for each reference."""

    def _movements(self, candidate: Any, *references: Any) -> list[Movement]:
        return [Movement.over(kls, self.members) for kls in self._prompt_kls(candidate, references)]

    @property
    def slices(self) -> tuple[str, ...]:
        """Names of the slices."""
        return tuple(self.members)

    def audit(self) -> Audit:
        """Evaluate the current weights and compare them with the reference."""
        return self._audited(drift=False)

    def audit_with_drift(self) -> Audit:
        """The same, and compare them with pi_ref in the same pass."""
        overridden = getattr(self.audit, "__func__", None) is not ReferenceKL.audit
        return self.audit() if overridden else self._audited(drift=True)

    def _audited(self, *, drift: bool) -> Audit:
        if self._reference is None:
            raise RuntimeError(f"{type(self).__name__} has no reference yet; call anchor() before the weights move")

        def compared() -> Audit:
            policy = self._policy()
            also = [self._origin] if drift and self._origin is not self._reference else []
            moved = self._movements(policy, self._reference, *also)
            return Audit(moved[0], policy, moved[-1] if drift else None)

        audit = self._measured(compared)
        self._tell_leftovers(audit.policy)
        return audit

    def _measured(self, read: Callable[[], T]) -> T:
        """Run a reading isolated; once more if it may have depended on what forwards write.

        Raises:
            ValueError: it has written what cannot be put back.
        """
        for _ in range(READINGS):
            with isolated(self.modules(), watch=self._watch, state=self._state) as self.used:
                found = read()
            self._state.refuse()
            if not self._state.learned or any(map(has_fsdp, self.used)):  # there all processes make as many forwards
                break
        return found

    def _tell_leftovers(self, policy: Any) -> None:
        """Say which attributes were not read as they are, if it makes a difference: see `ModuleState`.

        Raises:
            Incomparable: they are other observations.
        """
        new = self._state.stale - self._told
        self._told |= new
        if not new or (dist.is_available() and dist.is_initialized()):
            return
        try:
            with isolated(self.modules(), watch=self._watch):
                (moved,) = self._movements(self._policy(), policy)
        except Incomparable:
            raise
        except Exception:  # an image's position offsets do not fit these prompts, say
            moved = None
        if moved is None or moved.mean != 0:
            names = sorted(f"{type(module).__name__}.{name}" for module, name in new)
            warnings.warn(
                f"{', '.join(names)} changed since {type(self).__name__} was made, and the policy depends on it. It "
                "holds tensors, so it is taken for something that a forward left behind, and audits go on with what it "
                "was then. If you set it yourself, call optimizer.refresh()",
                stacklevel=2,
            )

    def anchor(self, audit: Audit | None = None) -> None:
        """Take an audited policy, or the current weights, as reference; the first one is pi_ref too."""
        if audit is None:
            self._reference = self._measured(self._policy)
            self._tell_leftovers(self._reference)
        else:
            self._reference = audit.policy
        if self._origin is None:
            self._origin = self._reference

    def drift(self, audit: Audit | None = None) -> Movement:
        """Movement of an audited policy, or of the reference, from pi_ref."""
        if audit is not None and audit.drift is not None:
            return audit.drift
        with torch.no_grad():
            (drifted,) = self._movements(self._reference if audit is None else audit.policy, self._origin)
            return drifted

    def forget_origin(self) -> None:
        """Let the next reference be pi_ref."""
        self._origin = None

    def forget_attributes(self) -> None:
        """Take the modules' attributes as they are at the next measurement for settings of the user's."""
        self._state.forget()

    def fingerprint(self, own: Collection[int] = ()) -> Any:
        """Of every parameter and buffer of the modules that were used; see `fingerprint.fingerprint`."""
        return fingerprint(self.used, own)

    @property
    def measures_drift(self) -> bool:
        """True."""
        return True
