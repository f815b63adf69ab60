"""PolicyKL: movement of any policy that is a function of the weights: PPO on Gymnasium, bandits, classifiers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, kl_divergence

from step_optim.audit import Incomparable
from step_optim.control import checked_slices
from step_optim.isolation import isolated
from step_optim.logit_kl import LogitKL
from step_optim.rows import Rows


class PolicyKL(LogitKL):
    """KL between the action distributions of the current weights and those before the step.

    Each of the N control observations counts as one prompt with one row. The
    function is called once here, to learn what it returns.

    Args:
        fn: takes nothing; returns logits [N, A], or a
            `torch.distributions.Distribution` with batch shape [N, ...], at the
            current weights on N fixed observations.
        slices: observation indices, or a boolean mask [N], by slice name.
        model: the module behind ``fn``. Needed only if ``fn`` calls its
            methods rather than ``model(...)`` and it has dropout or BatchNorm.

    ``fn`` must be a function of the weights alone. After changing the
    observations it closes over, call ``optimizer.refresh(restart_drift=True)``.

    >>> policy = nn.Linear(3, 2)
    >>> kl = PolicyKL(lambda: policy(torch.eye(3)), slices={"left": [0], "right": [1, 2]})
    >>> kl.anchor(); kl().mean
    0.0
    """

    def __init__(
        self,
        fn: Callable[[], Tensor | Distribution],
        slices: Mapping[str, Sequence[int]] | None = None,
        *,
        model: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if not callable(fn):
            raise TypeError(f"fn={fn!r:.60} is not callable; pass a function that returns logits or a Distribution")
        self.fn, self._model = fn, model
        with isolated(self.modules()):
            policy = self._evaluate()
        self.has_logits = isinstance(policy, Rows)
        self.prompts = _count(policy)
        self.members = checked_slices(slices or {}, self.prompts)
        device = policy.x.device if isinstance(policy, Rows) else next(iter(_tensors(policy).values())).device
        self._prompt_of_row = torch.arange(self.prompts, device=device)

    def modules(self) -> Iterable[nn.Module]:
        """Return the model, if it is known."""
        return () if self._model is None else (self._model,)

    def _evaluate(self) -> Rows | Distribution:
        out = self.fn()
        if isinstance(out, Categorical) and out.logits.dim() == 2:
            out = out.logits
        if isinstance(out, Tensor):
            if out.dim() != 2 or 0 in out.shape:
                raise ValueError(f"fn returned logits of shape {tuple(out.shape)}; give [observations, actions]")
            return Rows(out)
        if not isinstance(out, Distribution):
            raise TypeError(
                f"fn returned {type(out).__name__}; give logits [N, A] or a torch.distributions.Distribution"
            )
        if not out.batch_shape or out.batch_shape[0] == 0:
            raise ValueError(
                f"fn returned a distribution of batch shape {tuple(out.batch_shape)}; its first dimension must be the "
                "control observations"
            )
        return out

    def _policy(self) -> Any:
        policy = self._evaluate()
        if _count(policy) != self.prompts:
            raise Incomparable(f"fn returned {_count(policy)} observations, {self.prompts} at first; keep them fixed")
        if isinstance(policy, Rows):
            return Rows(policy.x.clone())
        # A distribution may hold a parameter itself (a state-independent std), which later steps move. And torch's
        # closed forms lose movements below 1e-7 nats in float32.
        kept = copy.deepcopy(policy)
        _fill(kept, {name: t.double() if t.is_floating_point() else t for name, t in _tensors(kept).items()})
        return kept

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        policy = self._evaluate()
        assert isinstance(policy, Rows)
        yield self._prompt_of_row, policy.x

    def _prompt_kls(self, candidate: Any, references: Sequence[Any]) -> list[list[float]]:
        if isinstance(candidate, Rows):
            return super()._prompt_kls(candidate, references)
        kls = [kl_divergence(candidate, reference) for reference in references]
        # Batch dimensions behind the first are factors of one policy: their KLs add up.
        return [kl.double().reshape(self.prompts, -1).sum(1).clamp_min(0).tolist() for kl in kls]

    def state_dict(self) -> dict[str, Any]:
        """pi_ref, as the tensors of its distribution."""
        if self._origin is None:
            return {}
        if isinstance(self._origin, Rows):
            return {"x": self._origin.x}
        return {"tensors": {path: tensor.detach().clone() for path, tensor in _tensors(self._origin).items()}}

    def _read_origin(self, state: Mapping[str, Any]) -> Rows | Distribution:
        with isolated(self.modules()):
            now = self._policy()
        kept = {"x": now.x} if isinstance(now, Rows) else _tensors(now)
        saved = {"x": state["x"]} if "x" in state else state["tensors"]  # torch caches more tensors as it computes
        if any(name not in saved or saved[name].shape != tensor.shape for name, tensor in kept.items()):
            raise ValueError(
                f"the checkpoint's pi_ref does not have the shape of this policy over {self.prompts} observations; "
                "resume with the observations of the run that saved it"
            )
        if isinstance(now, Rows):
            return Rows(saved["x"].to(now.x.device))
        restored: Distribution = now
        _fill(restored, {name: saved[name] for name in kept})
        return restored

    def __repr__(self) -> str:
        kind = "logits" if self.has_logits else "distribution"
        return f"PolicyKL({self.prompts} observations, {kind}, slices={list(self.members)})"


def _count(policy: Rows | Distribution) -> int:
    return policy.x.shape[0] if isinstance(policy, Rows) else policy.batch_shape[0]


def _tensors(distribution: Distribution, path: str = "") -> dict[str, Tensor]:
    """Tensors of a distribution and of those it is made of, by attribute path."""
    found = {}
    for name, value in vars(distribution).items():
        if isinstance(value, Tensor):
            found[path + name] = value
        elif isinstance(value, Distribution):
            found |= _tensors(value, f"{path}{name}.")
    return found


def _fill(distribution: Distribution, tensors: Mapping[str, Tensor]) -> None:
    for path, tensor in tensors.items():
        *parents, name = path.split(".")
        owner: Any = distribution
        for parent in parents:
            owner = getattr(owner, parent)
        setattr(owner, name, tensor.to(getattr(owner, name).device))
