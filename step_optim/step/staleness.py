"""Whether the KL closure's reference still is the policy of theta_t."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from step_optim.audit.closure import KLClosure
from step_optim.audit.fingerprint import Fingerprint
from step_optim.snapshot.tensors import any_of
from step_optim.step.measurable import check_budget
from step_optim.step.progress import Run


class Staleness:
    """Compares theta_t with what was committed last: somebody else may have written weights or buffers since.

    Args:
        kl: this step's KL closure.
        anchored: the KL closure and its fingerprint, as `Step.remember` kept them; None if the reference has to be
            taken anew.
        now: the KL closure's fingerprint at theta_t.
        changed: whether the optimizer's own weights are others than those of the latest step.
    """

    def __init__(self, kl: KLClosure, anchored: Any, now: Any, changed: bool | Tensor) -> None:
        self._now, self._changed = now, changed
        self._known = anchored is not None
        self._own = self._known and anchored[0] is kl
        self._then: Any = anchored[1] if self._known else None
        self._stale: bool | Tensor = True
        if self._known:
            self._stale = any_of([changed, not self._own or _differ(self._then, now)])

    @property
    def is_pending(self) -> bool:
        """Whether an accelerator still has to tell."""
        return isinstance(self._stale, Tensor)

    @property
    def stale(self) -> bool:
        """Whether the reference is another policy; waits for an accelerator."""
        if isinstance(self._stale, Tensor):
            self._stale = bool(self._stale)
        return self._stale

    @property
    def edited(self) -> bool:
        """Whether that is because somebody else has written weights since the latest step."""
        return self._known and self.stale and bool(any_of([self._changed, self._own and self._weights_differ()]))

    def _weights_differ(self) -> bool | Tensor:
        """The same without buffers, which training forwards write."""
        then, now = self._then, self._now
        return then.weights_differ(now) if isinstance(then, Fingerprint) else bool(then != now)


def anchored_before(run: Run, kl: KLClosure) -> Any:
    """Begin with what `Step.remember` kept, which is not certain any more, and hold what is measured on.

    Returns:
        The KL closure, its fingerprint and how often it was renewed; None if the reference has to be taken anew: for
        observations that were renewed, too.

    Raises:
        ValueError: the budget limits a slice that the new observations do not have.
    """
    kl.hold()
    kept, run.anchored = run.anchored, None
    if kl is run.kl and kl.renewals != run.renewals:
        check_budget(run.budget, kl)
        if not kl.has_origin:
            run.controller.forget_reference(run.memory)
            run.warned.of_restart(run.budget, kl)
        run.renewals = kl.renewals
    renewed = kept is not None and kept[0] is kl and kept[2] != kl.renewals
    return None if renewed else kept


def _differ(then: Any, now: Any) -> bool | Tensor:
    return then.differs(now) if isinstance(then, Fingerprint) else bool(then != now)
