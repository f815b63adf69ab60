"""KL closures that own their reference: a policy that was evaluated, kept, and is compared with."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from step_optim.audit.closure import Audit, KLClosure
from step_optim.audit.fingerprint import Fingerprints
from step_optim.audit.spans import Span
from step_optim.host.modules import has_fsdp
from step_optim.isolation.eval_mode import isolated
from step_optim.isolation.module_state import ModuleState
from step_optim.movement import Movement

T = TypeVar("T")


READINGS = 3
"""Readings at most until no forward writes anything that is not known yet."""


class Incomparable(ValueError):
    """The policy is over other observations than its reference: there is no movement between the two."""


class ReferenceKL(KLClosure):
    """A KL closure that owns its reference: a policy that was evaluated, kept, and is compared with.

    Subclasses evaluate (`_policy`) and compare (`_movements`); what a policy is
    stays theirs. pi_ref is the first reference that was ever taken.
    """

    isolates = True

    prompts: int
    """C."""

    members: Mapping[str, tuple[int, ...]]
    """Prompt indices of each slice."""

    spans: Mapping[str, Span]
    """The response tokens in each span."""

    has_tokens = False
    """Whether the prompts have tokens, one of which moves most."""

    def __init__(self) -> None:
        self.spans = {}
        self._reference: Any = None
        self._origin: Any = None
        self._state, self._fingerprints = ModuleState(), Fingerprints()
        self._told: set[tuple[nn.Module, str]] = set()
        """Attributes that forwards left behind, and what they make of a reading was told."""
        self._watch = True
        """Whether measurements may call modules that are not among `modules`."""

    @abstractmethod
    def _policy(self) -> Any:
        """Evaluate the current weights; called isolated."""

    @abstractmethod
    def _movements(self, candidate: Any, *references: Any) -> list[Movement]:
        """Movement of a policy from each of some others."""

    @property
    def slices(self) -> tuple[str, ...]:
        """Names of the slices, and of the spans of response positions."""
        return (*self.members, *self.spans)

    @property
    def counts(self) -> Mapping[str, int]:
        """How many prompts this process measures: all of them, of each slice, and with a token in each span."""
        spans = {name: len(span.prompts) for name, span in self.spans.items()}
        return {"mean": self.prompts, **{name: len(members) for name, members in self.members.items()}, **spans}

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

    @property
    def has_origin(self) -> bool:
        """Whether some policy was the reference before."""
        return self._origin is not None

    def forget_origin(self) -> None:
        """Let the next reference be pi_ref."""
        self._origin = None

    def take_origin(self) -> None:
        """Take the policy of the current weights as pi_ref; the reference stays what it is."""
        self._origin = self._measured(self._policy)

    def forget_attributes(self) -> None:
        """Take the modules' attributes as they are at the next measurement for settings of the user's."""
        self._state.forget()

    def fingerprint(self, own: Collection[int] = ()) -> Any:
        """Of every parameter and buffer of the modules that were used; see `Fingerprints`."""
        return self._fingerprints.of(self.used, own)

    def release(self) -> None:
        """Let go of the views that fingerprints are read through: they would keep memory that `Module.to` frees."""
        self._fingerprints.release()

    @property
    def measures_drift(self) -> bool:
        """True."""
        return True
