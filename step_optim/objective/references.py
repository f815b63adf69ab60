"""Reference policies, which the KL penalty in a loss holds the policy to: fixed, a slow average, ratcheted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize

from step_optim.host.modules import has_fsdp, plain
from step_optim.objective.ppo import read_count

_COUNTERS = ("updates", "moves", "holds")


class ReferenceAction(str, Enum):
    """What became of a reference after a policy update."""

    KEPT = "kept"
    """It was not to move."""
    MOVED = "moved"
    """It follows the policy."""
    HELD = "held"
    """It was to move, and its cap held it back."""

    def __str__(self) -> str:
        return self.value


class Reference(ABC):
    """A reference policy, kept as the weights that training moves; the rest of the model is shared.

    Called like the model, it runs the model at the reference's weights,
    without gradients. These stand in for the model's own during the call, and
    nothing is written: for `STEPOptimizer`, and for autograd, a call between
    two steps has not happened. What is no kept weight is the model's as it is
    then: training or eval mode (dropout), random streams, buffers (BatchNorm in
    training mode counts a call in), frozen weights, PEFT's active adapter. While
    an adapter is merged or switched off, its weights are not read, the
    reference's neither.

    Args:
        model: the policy. Under PEFT make the reference once the adapter
            exists: the adapter is all that is kept. Of DDP and of a compiled
            model the module inside is run.
        parameters: which of its parameters to keep; by default those with
            ``requires_grad``.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: no parameter to keep, or one that the model does not have;
            a model under FSDP, which puts its own weights in at every forward.
    """

    def __init__(self, model: nn.Module, parameters: Iterable[Tensor] | None = None) -> None:
        self.model = model
        self.updates, self.moves, self.holds = 0, 0, 0
        self._all = parameters is None
        self._names = _chosen(model, parameters)
        self._weights = self._copy()

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What ``model(*args, **kwargs)`` returns at the reference's weights, without a graph."""
        policy = self._policy()
        if parametrize._cache_enabled:
            raise RuntimeError(
                "a reference cannot be called inside torch.nn.utils.parametrize.cached(): the policy and it would read "
                "each other's weights; call it outside"
            )
        self._weights = {name: kept.to(policy[name].device) for name, kept in self._weights.items()}  # a moved model
        weights = {name: kept.to(policy[name].dtype) for name, kept in self._weights.items()}
        return functional_call(plain(self.model), weights, args, kwargs)

    @torch.no_grad()
    def update(self, drift: float | None = None) -> ReferenceAction:
        """Follow the policy; to be called once after every policy update.

        Args:
            drift: movement of the current policy from the original one [nats
                per token]. Only a `RatchetReference` with a cap reads it.
        """
        action = self._follow(drift)
        self.updates += 1
        self.moves += action is ReferenceAction.MOVED
        self.holds += action is ReferenceAction.HELD
        return action

    @abstractmethod
    def _follow(self, drift: float | None) -> ReferenceAction:
        """Take new weights, or not."""

    def _copy(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self._policy().items()}

    def _policy(self) -> dict[str, Tensor]:
        """The parameters that are kept, as the policy has them now."""
        _refuse_sharded(self.model)
        now = dict(plain(self.model).named_parameters(remove_duplicate=False))
        lost = [name for name in self._names if name not in now]
        if lost:
            raise RuntimeError(f"the model has no parameter {lost[0]!r} any more; wrap it before making the reference")
        policy = {name: now[name] for name in self._names}
        known = set(map(id, policy.values()))
        late = [name for name, p in now.items() if p.requires_grad and id(p) not in known]
        if late and self._all:
            raise RuntimeError(
                f"{late[0]!r} is trained now, and was not when the reference was made: it is shared, and the reference "
                "would move with the policy. Make the reference later, or name its weights with parameters="
            )
        return policy

    def state_dict(self) -> dict[str, Any]:
        """Counters, and copies of the weights by name."""
        counters = {name: getattr(self, name) for name in _COUNTERS}
        return counters | {"weights": {name: kept.clone() for name, kept in self._weights.items()}}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned, onto the policy's devices.

        Raises:
            ValueError: a missing, unknown or damaged entry; nothing was changed.
        """
        counters = {name: read_count(state, name) for name in _COUNTERS}
        policy, saved = self._policy(), state.get("weights")
        if not isinstance(saved, Mapping) or saved.keys() != policy.keys():
            wrong = sorted(map(str, policy.keys() ^ (saved.keys() if isinstance(saved, Mapping) else ())))
            raise ValueError(
                f"state['weights'] is of another model: {wrong[:3]} are in one of the two only ({len(wrong)} in all); "
                "load it into a reference that keeps the same parameters"
            )
        for name, p in policy.items():
            if not isinstance(saved[name], Tensor) or saved[name].shape != p.shape:
                shape = tuple(getattr(saved[name], "shape", ()))
                raise ValueError(f"state['weights'][{name!r}] has the shape {shape}, the model's {tuple(p.shape)}")
        kinds = {name: {"device": p.device, "dtype": self._weights[name].dtype} for name, p in policy.items()}
        self._weights = {name: saved[name].detach().to(**kinds[name], copy=True) for name in policy}
        vars(self).update(counters)


class FixedReference(Reference):
    """The policy as it is now, for ever.

    >>> policy = nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.constant_(policy.weight, 2.0)
    >>> reference = FixedReference(policy)
    >>> _ = nn.init.constant_(policy.weight, 6.0)
    >>> policy(torch.ones(1)).item(), reference(torch.ones(1)).item(), str(reference.update())
    (6.0, 2.0, 'kept')
    """

    def _follow(self, drift: float | None) -> ReferenceAction:
        return ReferenceAction.KEPT


class EMAReference(Reference):
    """A slow average of the policies: w_ref <- decay w_ref + (1 - decay) w after every update.

    Weights of less than 32 bits are averaged in float32, where small changes
    are not lost, and rounded when the model runs.

    Args:
        model: as in `Reference`.
        decay: 0 is the policy itself, 1 a fixed reference; 0.95 averages over
            some 20 updates.
        parameters: as in `Reference`.

    Raises:
        ValueError: ``decay`` outside [0, 1]; parameters that are no numbers to average (quantised ones).

    >>> policy = nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.constant_(policy.weight, 2.0)
    >>> reference = EMAReference(policy, decay=0.75)
    >>> _ = nn.init.constant_(policy.weight, 6.0)
    >>> str(reference.update()), reference(torch.ones(1)).item()
    ('moved', 3.0)
    """

    def __init__(self, model: nn.Module, decay: float = 0.95, parameters: Iterable[Tensor] | None = None) -> None:
        if not 0 <= decay <= 1:
            raise ValueError(f"decay={decay} must lie between 0 (the policy itself) and 1 (a fixed reference)")
        self.decay = decay
        super().__init__(model, parameters)

    def _copy(self) -> dict[str, Tensor]:
        policy = self._policy()
        whole = [name for name, p in policy.items() if not (p.is_floating_point() or p.is_complex())]
        if whole:
            raise ValueError(f"{whole[0]!r} is {policy[whole[0]].dtype}, which has no average; leave it out")
        return {name: p.detach().to(_wide(p.dtype), copy=True) for name, p in policy.items()}

    def _follow(self, drift: float | None) -> ReferenceAction:
        if self.decay == 1:  # nor would 0 w be 0 of a weight that is not finite
            return ReferenceAction.KEPT
        policy = self._copy()
        if self.decay > 0:
            before = {name: self._weights[name].to(w.device, w.dtype) for name, w in policy.items()}
            policy = {name: torch.lerp(before[name], w, 1 - self.decay) for name, w in policy.items()}
        self._weights = policy
        return ReferenceAction.MOVED


class RatchetReference(Reference):
    """The policy of some updates ago: after every ``every``-th one the reference becomes the current policy.

    With a cap only if that policy is not too far from the original one;
    otherwise the reference is held, and tries again ``every`` updates later.

    Args:
        model: as in `Reference`.
        every: updates from one move to the next.
        cap: largest movement from the original policy [nats per token] of a
            policy that becomes the reference; None for no limit. `update` then
            needs ``drift=optimizer.last.reference_drift.mean``.
        parameters: as in `Reference`.

    Raises:
        ValueError: ``every`` below 1; ``cap`` negative or NaN.

    >>> policy = nn.Linear(1, 1, bias=False)
    >>> reference = RatchetReference(policy, every=2, cap=0.1)
    >>> [str(reference.update(drift)) for drift in (0.05, 0.08, 0.09, 0.12)]
    ['kept', 'moved', 'kept', 'held']
    """

    def __init__(
        self,
        model: nn.Module,
        every: int = 1,
        cap: float | None = None,
        parameters: Iterable[Tensor] | None = None,
    ) -> None:
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"every={every} must be a whole number of updates, at least 1")
        if cap is not None and not cap >= 0:
            raise ValueError(f"cap={cap} must be a KL >= 0 in nats per token, or None for no limit")
        self.every, self.cap = every, cap
        super().__init__(model, parameters)

    def _follow(self, drift: float | None) -> ReferenceAction:
        beyond = self.cap is not None and _checked_drift(drift) > self.cap  # a wrong drift is told at the first update
        if (self.updates + 1) % self.every != 0:
            return ReferenceAction.KEPT
        if beyond:
            return ReferenceAction.HELD
        self._weights = self._copy()
        return ReferenceAction.MOVED


def _chosen(model: nn.Module, parameters: Iterable[Tensor] | None) -> list[str]:
    """Names of the parameters to keep, each of the tied ones once."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={model!r:.60} is no torch module")
    named = dict(plain(model).named_parameters())
    if parameters is None:
        chosen = [name for name, p in named.items() if p.requires_grad]
    else:
        wanted = set(map(id, parameters))
        chosen = [name for name, p in named.items() if id(p) in wanted]
        if len(chosen) < len(wanted):
            unknown = len(wanted) - len(chosen)
            raise ValueError(
                f"parameters: {unknown} of the {len(wanted)} are not parameters of the model; leave them out"
            )
    if not chosen:
        raise ValueError(
            "there is nothing to keep: no parameter of the model requires a gradient; make the reference when the "
            "model is ready to be trained, or name its weights with parameters="
        )
    return chosen


def _refuse_sharded(model: nn.Module) -> None:
    if has_fsdp(model) or any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise ValueError(
            "model is under FSDP, which puts its own weights in at every forward: a reference's would not be read. "
            "Keep a second model as the reference"
        )


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _checked_drift(drift: float | None) -> float:
    if drift is None or not drift >= 0:
        raise ValueError(
            f"drift={drift}: a ratchet with a cap needs the KL >= 0 in nats per token of the current policy from the "
            "original one; pass drift=optimizer.last.reference_drift.mean, which TokenKL and PolicyKL measure"
        )
    return float(drift)
