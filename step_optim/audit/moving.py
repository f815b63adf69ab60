"""KL closures whose observations move on: the control set is the latest rollout."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from step_optim.audit.closure import Audit
from step_optim.audit.first_policy import FirstPolicy
from step_optim.audit.logit_kl import LogitKL
from step_optim.audit.observations import Observed
from step_optim.control.control_set import checked_slices
from step_optim.host.modules import has_fsdp
from step_optim.isolation.eval_mode import isolated

DRIFTS = (None, "restart", "keep")
"""What becomes of pi_ref when observations are renewed."""


class MovingKL(LogitKL):
    """A `LogitKL` whose observations may be renewed between two steps."""

    def __init__(self, observed: Observed | None, drift: str | None) -> None:
        super().__init__()
        if drift not in DRIFTS:
            raise ValueError(f"drift={drift!r} is unknown; use 'restart', 'keep' or None")
        if drift is not None and observed is None:
            raise ValueError(f"drift={drift!r} is about observations that are renewed; give observations=, too")
        self._observed, self._after_renewal = observed, drift
        self._first_weights: FirstPolicy | None = None
        """The weights of pi_ref, if they are kept."""
        self._in_step = False
        self._own_renewals = 0

    @property
    def restarts_unasked(self) -> bool:  # type: ignore[override]
        """Whether new observations make another policy pi_ref, and nobody said that they should."""
        return self._observed is not None and self._after_renewal is None

    @property
    def renewals(self) -> int:  # type: ignore[override]
        """How often observations were renewed, those of pool and held-out set included."""
        return self._own_renewals + sum(other.renewals for other in self._others.values())

    def observe(
        self,
        observations: Any,
        slices: Mapping[str, Sequence[int]] | Sequence[Any] | None = None,
        *,
        drift: str | None = None,
    ) -> None:
        """Measure on other observations from the next step on: the rollout that it is made of, say.

        The next step takes its reference on them, by one forward; the old ones are not read any more. Nothing is
        evaluated here. Observations of pool and held-out set are renewed by themselves: ``kl.pool.observe(...)``.

        Args:
            observations: nested as those that the closure was made with; N may be another one.
            slices: of these observations, as in the constructor; none by default. A slice that the budget limits has
                to be among them.
            drift: what becomes of pi_ref. ``"restart"``: it is the policy at the next step. ``"keep"``: it stays the
                policy that it was, and is read on the new observations by one forward more. By default what the
                constructor was told; if that is nothing, it restarts.

        Raises:
            RuntimeError: inside a step or a window.
            TypeError: the closure was made without ``observations=``; or what `Observed` refuses.
            ValueError: ``"keep"``, and the closure was not made so.

        >>> import torch
        >>> from step_optim import PolicyKL
        >>> policy = torch.nn.Linear(3, 2)
        >>> kl = PolicyKL(policy, observations=torch.eye(3))
        >>> kl.observe(torch.ones(5, 3), slices={"all": range(5)})
        >>> kl
        PolicyKL(5 observations, logits, slices=['all'])
        """
        if self._observed is None:
            raise TypeError(
                f"{type(self).__name__} was made without observations=, so that fn has its own; make it as "
                "PolicyKL(fn, observations=...), with an fn that takes them"
            )
        if self._in_step:
            raise RuntimeError(
                "observe() inside a step: its candidate is measured on what the reference was taken on; call it before "
                "step() or window()"
            )
        keeps = self._keeps(drift)
        new = Observed(self._observed.fn, observations)
        members = checked_slices({} if slices is None else slices, new.count)
        self._observed.take(new)
        self._lay_out(new.count, members)
        self._reference, self._origin = None, None
        if not keeps:
            self.forget_origin()
        self._own_renewals += 1

    @abstractmethod
    def _lay_out(self, count: int, members: Mapping[str, tuple[int, ...]]) -> None:
        """Expect so many observations, in these slices."""

    def _keeps(self, drift: str | None) -> bool:
        """Read the argument ``drift=`` of `observe`."""
        if drift not in DRIFTS:
            raise ValueError(f"drift={drift!r} is unknown; use 'restart', 'keep' or None")
        if drift == "keep" and self._after_renewal != "keep":
            raise ValueError(
                "drift='keep': the weights of pi_ref were not kept, so that nothing knows what it says of other "
                "observations; make the closure as PolicyKL(fn, observations=..., drift='keep')"
            )
        return (drift or self._after_renewal) == "keep"

    # -- in a step ----------------------------------------------------------------------------------------------------

    def hold(self) -> None:
        """A step begins: observations stay as they are until `release`."""
        self._in_step = True
        for other in self._others.values():
            other.hold()

    def release(self) -> None:
        """Let go of what only serves a step in progress: it has ended."""
        super().release()
        self._in_step = False
        for other in self._others.values():
            other.release()

    # -- pi_ref -------------------------------------------------------------------------------------------------------

    def anchor(self, audit: Audit | None = None) -> None:
        """Take an audited policy, or the current weights, as reference; the first is pi_ref, too, also on the pool."""
        if not all(other.has_origin for other in self._others.values()):
            self.forget_origin()  # it restarted on one of them: all are measured from one policy
        self.complete_origin()
        super().anchor(audit)
        if self._after_renewal == "keep" and self._first_weights is None:
            self._first_weights = FirstPolicy(self._all_modules())

    def _all_modules(self) -> Iterator[nn.Module]:
        """All that the policy may be read from: the whole model, where it is known, and what ``fn`` has called."""
        fn = None if self._observed is None else self._observed.fn
        for root in [*self.modules(), *([fn] if isinstance(fn, nn.Module) else [])]:
            yield from root.modules()
        yield from self.used

    def complete_origin(self) -> None:
        """Read pi_ref on observations that are new, here and on the pool, if its weights are kept."""
        if self._origin is None and self._first_weights is not None:
            self._origin = self._read_first(self._first_weights)
        for other in self._others.values():
            other.complete_origin()

    def _read_first(self, first: FirstPolicy) -> Any:
        modules = [*self.modules(), *first.modules]
        with isolated(modules, watch=self._watch, state=self._state) as used, first.standing_in():
            policy = self._policy()
        late = [
            module for module in used if module not in first.modules and any(True for _ in module.parameters(False))
        ]
        if late:
            raise ValueError(
                f"drift='keep': on these observations fn calls {type(late[0]).__name__}, which it did not call when "
                "pi_ref was kept, so that its weights of that time are not known; name the whole policy, PolicyKL(fn, "
                "model=...)"
            )
        return policy

    @property
    def has_origin(self) -> bool:
        """Whether some policy was the reference before."""
        return self._origin is not None or self._first_weights is not None

    def forget_origin(self) -> None:
        """Let the next reference be pi_ref."""
        super().forget_origin()
        self._first_weights = None

    def take_origin(self) -> None:
        """Take the policy of the current weights as pi_ref; the reference stays what it is."""
        if self._after_renewal == "keep":
            raise ValueError(
                "origin='adapter_off' and PolicyKL(..., drift='keep') do not go together: the weights without the "
                "adapter are not kept; use drift='restart'"
            )
        super().take_origin()

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """pi_ref: its weights if they are kept; else what it says, and of which observations."""
        if not self.has_origin:
            return {}
        if self._first_weights is not None:
            return {"weights": self._first_weights.state_dict()} | self._more_state()
        observed = {} if self._observed is None else {"observed": self._observed.digest()}
        return self._origin_state() | observed | self._more_state()

    @abstractmethod
    def _origin_state(self) -> dict[str, Any]:
        """What pi_ref says, in tensors."""

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """Refuse a pi_ref of another policy, or one that is damaged."""
        if not self._is_of_others(state):
            super().check_state_dict(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over pi_ref. One of other observations, where it restarts with these, is the policy at the next step."""
        if self._is_of_others(state):
            self.forget_origin()
            self._penalties = int(state.get("penalties", 0))
            return
        super().load_state_dict(state)
        if "weights" in state:
            self._first_weights = self._first_of(state)

    def _is_of_others(self, state: Mapping[str, Any]) -> bool:
        """Whether a checkpoint's pi_ref restarts, because its observations are not these."""
        if self._observed is None or self._after_renewal == "keep" or not state:
            return False
        return "weights" in state or ("observed" in state and state["observed"] != self._observed.digest())

    def _first_of(self, state: Mapping[str, Any]) -> FirstPolicy:
        first = FirstPolicy(self.used)
        first.load(state["weights"])
        return first

    def _loaded_first(self, state: Mapping[str, Any]) -> Any:
        """What the pi_ref of a checkpoint says of these observations.

        Raises:
            ValueError: its weights are not kept in there, or not here.
        """
        if self._after_renewal == "keep" and "weights" in state:
            return self._read_first(self._first_of(state))
        raise ValueError(
            "the checkpoint's pi_ref and this one's are not kept in the same way: resume with the observations= and "
            "the drift= of the run that saved it, or leave out its entry 'kl' to let drift begin anew"
        )

    def _check_keeps(self, beside: bool) -> None:
        """Refuse to keep the weights of a policy that has some out of sight.

        Args:
            beside: whether fn reads something that is trained, and in none of the modules that it calls.
        """
        if any(has_fsdp(module) for module in self.used):
            raise ValueError("drift='keep': FSDP2 has split the weights, and pi_ref is a copy of them; use 'restart'")
        if beside or not self.used:
            raise ValueError(
                "drift='keep': fn reads weights that are in none of the modules that it calls (a bare parameter, say), "
                "so that pi_ref could not be kept; put them into a module and give it as model=, or use 'restart'"
            )
