"""A model under DDP or FSDP2, an optimizer, and STEP around it: what the jobs of `rank_jobs` train."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from step_optim import Budget, ControlSet, Gate, Interpolate, Project, Steer, STEPOptimizer, TokenKL
from tests.strategies import Bigram, bits

Pull = functools.partial(Steer, pull=True)
CONTROLLERS = {
    "Gate": Gate,
    "Interpolate": Interpolate,
    "Project": lambda: Project(steps=1),
    "Steer": Steer,
    "pull": Pull,
}
INF = math.inf


def control_set() -> ControlSet:
    """Eight prompts of several lengths in two slices."""
    prompts = [[1, 2], [3], [4, 5, 6], [7], [8, 9], [2, 3, 4], [5], [6, 7]]
    responses = [[7, 8, 9], [10], [11, 12], [1, 2, 3, 4], [5, 6], [3], [9, 8, 7], [4, 4]]
    return ControlSet.from_ids(prompts, responses, slices={"a": [0, 1, 2], "b": [3, 4, 5, 6, 7]})


def pool() -> ControlSet:
    """Six other prompts."""
    prompts = [[9], [10, 11], [12, 1], [6], [2], [3, 3, 3]]
    return ControlSet.from_ids(
        prompts, [[1], [2, 3], [4], [5, 6], [7], [8, 9]], slices={"a": [0, 1], "b": [2, 3, 4, 5]}
    )


def batch(step: int, *, own: bool) -> Tensor:
    """Token ids [8, 5] of a step, or this rank's part of them."""
    ids = torch.randint(0, 13, (8, 5), generator=torch.Generator().manual_seed(step))
    return ids[dist.get_rank() :: dist.get_world_size()] if own else ids


class Capped(Bigram):
    """Logits are capped behind the head, so that an audit reads the logits of each micro-batch by themselves."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return 3 * torch.tanh(super().forward(input_ids) / 3)


class Training:
    """A run of one rank.

    Args:
        kind: ``"ddp"``, ``"fsdp"`` (the head in a group of its own), ``"root"`` (one FSDP2 group) or ``"plain"``.
        budget: None for the bare optimizer; a list has a mean for every step.
        controller: its name.
        shard: whether the control set is sharded.
        own: whether each rank trains on its own part of the data.
        exact: gradients from whole weights in every process, which no all-reduce has rounded; and a `Capped` model.
        frozen_head: whether the head is not trained.
        micro_batch: of the audit; 2 makes 4 batches, 3 makes 3.
        measure: what to make of the TokenKL.
        device: where.
        **options: of `STEPOptimizer`.
    """

    def __init__(
        self,
        kind: str,
        *,
        budget: Any = None,
        controller: str = "Interpolate",
        shard: bool = False,
        own: bool = False,
        exact: bool = False,
        frozen_head: bool = False,
        micro_batch: int = 2,
        measure: Callable[[TokenKL], Any] = lambda kl: kl,
        device: str = "cpu",
        **options: Any,
    ) -> None:
        # FSDP2 says so of every model that ends in a linear layer over [B, T, D].
        warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module \(.*\) returned a view tensor")
        torch.manual_seed(0)
        self.device = torch.device(device)
        self.plain = (Capped if exact else Bigram)().to(self.device)
        self.plain.lm_head.requires_grad_(not frozen_head)
        self.own, self.exact = own, exact
        if kind == "fsdp":
            fully_shard(self.plain.lm_head)
        if kind in ("fsdp", "root"):
            fully_shard(self.plain)
        self.model: nn.Module = DistributedDataParallel(self.plain) if kind == "ddp" else self.plain
        self.inner = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=0.05)
        self.optimizer: Any = self.inner
        if budget is not None:
            steers = controller in ("Steer", "pull")
            kl = TokenKL(
                self.model,
                control_set().to(self.device),
                micro_batch=micro_batch,
                shard=shard,
                pool=pool().to(self.device) if steers else None,
            )
            self.optimizer = STEPOptimizer(
                self.inner, measure(kl), budget=_budget(budget), controller=CONTROLLERS[controller](), **options
            )

    def loss(self, step: int) -> Tensor:
        """Compute the loss of a step, with its gradients."""
        self.optimizer.zero_grad()
        ids = batch(step, own=self.own).to(self.device)
        if self.exact:
            return self._exact_loss(ids)
        loss = _loss(self.model(ids[:, :-1]), ids)
        loss.backward()
        return loss

    def _exact_loss(self, ids: Tensor) -> Tensor:
        weights = {name: _whole(p).requires_grad_() for name, p in self.plain.named_parameters()}
        loss = _loss(torch.func.functional_call(Capped(), weights, (ids[:, :-1],)), ids)
        gradients = torch.autograd.grad(loss, list(weights.values()))
        for p, gradient in zip(self.plain.parameters(), gradients, strict=True):
            p.grad = _like(p, gradient)
        return loss

    def step(self, step: int) -> None:
        """Train one step."""
        self.loss(step)
        self.optimizer.step()

    def weights(self) -> list[Any]:
        """The bits of the whole weights, gathered from all ranks."""
        return [bits(_whole(p)) for p in self.plain.parameters()]

    def values(self) -> list[float]:
        """The whole weights as numbers."""
        return [value for p in self.plain.parameters() for value in _whole(p).flatten().tolist()]

    def state(self) -> Any:
        """The bits of this rank's optimizer state."""
        return [bits({name: local(value) for name, value in state.items()}) for state in self.inner.state.values()]

    def picture(self) -> Any:
        """All that a rejection has to bring back, on this rank."""
        gradients = [None if p.grad is None else bits(local(p.grad)) for p in self.plain.parameters()]
        return [bits(local(p)) for p in self.plain.parameters()], self.state(), gradients


def _budget(budget: Any) -> Any:
    if isinstance(budget, dict):
        return Budget(**budget)
    if isinstance(budget, Sequence):
        return Budget(mean=lambda step: budget[step])
    return budget


def _loss(logits: Tensor, ids: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def _whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def _like(parameter: Any, tensor: Tensor) -> Tensor:
    if not hasattr(parameter, "placements"):
        return tensor
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


def local(tensor: Any) -> Any:
    """This rank's part of a tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def story(record: Any) -> dict[str, Any]:
    """A record without its times."""
    return record.to_dict() | {"seconds": None}
