"""What the processes of `test_distributed` do. A job returns plain values: they travel between processes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from step_optim import Budget, ControlSet, Gate, Interpolate, Project, STEPOptimizer, TokenKL
from tests.strategies import Bigram, bits

CONTROLLERS = {"Gate": Gate, "Interpolate": Interpolate, "Project": lambda: Project(steps=1)}
INF = math.inf


def control_set() -> ControlSet:
    """Eight prompts of several lengths in two slices."""
    prompts = [[1, 2], [3], [4, 5, 6], [7], [8, 9], [2, 3, 4], [5], [6, 7]]
    responses = [[7, 8, 9], [10], [11, 12], [1, 2, 3, 4], [5, 6], [3], [9, 8, 7], [4, 4]]
    return ControlSet.from_ids(prompts, responses, slices={"a": [0, 1, 2], "b": [3, 4, 5, 6, 7]})


def batch(step: int, *, own: bool) -> Tensor:
    """Token ids [6, 5] of a step: the same on all ranks, or those of this rank."""
    generator = torch.Generator().manual_seed(1000 * step + (dist.get_rank() if own else 999))
    return torch.randint(0, 13, (6, 5), generator=generator)


class Training:
    """A model under DDP or FSDP2, an optimizer, and STEP around it unless it is bare."""

    def __init__(
        self,
        kind: str,
        *,
        budget: Any = None,
        controller: str = "Interpolate",
        shard: bool = False,
        own: bool = False,
        measure: Callable[[TokenKL], Any] | None = None,
        device: str = "cpu",
        **options: Any,
    ) -> None:
        torch.manual_seed(0)
        self.device = torch.device(device)
        self.plain = Bigram().to(self.device)
        self.kind, self.own = kind, own
        if kind == "fsdp":
            fully_shard(self.plain)
        self.model: nn.Module = DistributedDataParallel(self.plain) if kind == "ddp" else self.plain
        self.inner = torch.optim.AdamW(self.model.parameters(), lr=0.05)
        self.optimizer: Any = self.inner
        if budget is not None:
            kl = TokenKL(self.model, control_set().to(self.device), micro_batch=2, shard=shard)
            self.optimizer = STEPOptimizer(
                self.inner,
                kl if measure is None else measure(kl),
                budget=budget,
                controller=CONTROLLERS[controller](),
                **options,
            )

    def loss(self, step: int) -> Tensor:
        """Compute the loss of a step, with its gradients."""
        self.optimizer.zero_grad()
        ids = batch(step, own=self.own).to(self.device)
        loss = nn.functional.cross_entropy(self.model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        return loss

    def step(self, step: int) -> None:
        """Train one step."""
        self.loss(step)
        self.optimizer.step()

    def weights(self) -> list[Any]:
        """The bits of the whole weights, gathered from all ranks."""
        return [bits(_whole(p)) for p in self.plain.parameters()]

    def state(self) -> Any:
        """The bits of this rank's optimizer state."""
        return [bits({name: _local(value) for name, value in state.items()}) for state in self.inner.state.values()]

    def picture(self) -> Any:
        """All that a rejection has to bring back, on this rank."""
        gradients = [None if p.grad is None else bits(_local(p.grad)) for p in self.plain.parameters()]
        return [bits(_local(p)) for p in self.plain.parameters()], self.state(), gradients


def _whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def _local(tensor: Any) -> Any:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def story(record: Any) -> dict[str, Any]:
    """A record without its times."""
    return record.to_dict() | {"seconds": None}


def train(kind: str, *, steps: int = 6, budget: Any = None, **options: Any) -> dict[str, Any]:
    """Train; rejected steps must leave no trace."""
    run = Training(kind, budget=budget, **options)
    records = []
    for step in range(steps):
        run.loss(step)
        before = run.picture()
        run.optimizer.step()
        if budget is not None:
            records.append(story(run.optimizer.last))
            if records[-1]["action"] == "reject":
                assert run.picture() == before
    return {"records": records, "weights": run.weights(), "state": run.state()}


def movement(kind: str, shard: bool) -> Any:
    """Measure a change of the weights which is the same everywhere."""
    run = Training(kind, budget=INF, shard=shard)
    kl = run.optimizer._run.kl
    run.step(0)
    run.step(1)
    return kl.sharded, story(run.optimizer.last)


def failing(
    kind: str,
    where: str,
    error: str,
    on_error: str,
    *,
    shard: bool = True,
    culprit: int = 1,
    at: int = 2,
    budget: float = INF,
) -> dict[str, Any]:
    """Train four steps; in step ``at`` one rank fails. Return what each step was here, and the weights."""
    errors = {"RuntimeError": RuntimeError, "KeyboardInterrupt": KeyboardInterrupt, "MemoryError": MemoryError}
    guilty = dist.get_rank() == culprit
    now = -1

    def fail(place: str) -> None:
        if guilty and place == where and now == at:
            raise errors[error]("as planned")

    def measured(kl: TokenKL) -> TokenKL:
        audit = kl.audit

        def audited() -> Any:
            fail("audit")
            result = audit()
            if guilty and where == "nan" and now == at:
                bad = replace(result.movement, prompts=(math.nan,) * len(result.movement.prompts or ()), mean=math.nan)
                return replace(result, movement=bad)
            return result

        def forward(batch: Any) -> Tensor:
            nonlocal forwards
            forwards += 1
            if forwards % 2 == 0:
                fail("between forwards")
            return plain_forward(batch)

        forwards, plain_forward = 0, kl._forward
        kl.audit, kl._forward = audited, forward  # type: ignore[method-assign]
        return kl

    run = Training(kind, budget=budget, shard=shard, measure=measured, on_error=on_error)
    plain_step = run.inner.step

    def inner_step(*args: Any, **kwargs: Any) -> Any:
        result = plain_step(*args, **kwargs)
        fail("inner")
        if guilty and where == "weights" and now == at:
            with torch.no_grad():
                _local(next(iter(run.plain.parameters()))).view(-1)[:1] = math.nan
        return result

    run.inner.step = inner_step  # type: ignore[method-assign]
    outcomes, exact = [], True
    for now in range(4):
        run.loss(now)
        before = run.picture()
        try:
            run.optimizer.step()
            outcomes.append(str(run.optimizer.last.action))
        except BaseException as raised:
            outcomes.append(f"{type(raised).__name__}: {raised}")
        if outcomes[-1] != "commit":
            exact = exact and run.picture() == before
    return {"outcomes": outcomes, "exact": exact, "weights": run.weights(), "last": run.optimizer.last.step}


def without_step(kind: str, left_out: int) -> list[Any]:
    """Train four steps but one, on the gradients that they have in a run where it was rejected."""
    run = Training(kind)
    for step in range(4):
        run.loss(step)
        if step != left_out:
            run.inner.step()
    return run.weights()


def unequal_budgets() -> str:
    """Give each rank a budget of its own."""
    run = Training("ddp", budget=Budget(mean=1.0 + dist.get_rank()))
    before = run.weights()
    try:
        run.step(0)
    except ValueError as error:
        assert run.weights() == before
        return str(error)
    return "no error"


def refused(kind: str, shard: bool) -> str:
    """Try `Project` where it cannot be."""
    try:
        Training(kind, budget=1.0, controller="Project", shard=shard)
    except ValueError as error:
        return str(error)
    return "taken"


def windowed(budget: float) -> dict[str, Any]:
    """Three inner steps in one window."""
    run = Training("ddp", budget=budget, shard=True, own=True)
    before = run.weights()
    with run.optimizer.window():
        for step in range(3):
            run.step(step)
    return {"record": story(run.optimizer.last), "weights": run.weights(), "moved": run.weights() != before}


def alone() -> dict[str, Any]:
    """Let each rank decide by itself: `process_group=None`."""
    run = Training("plain", budget=1e-4 if dist.get_rank() == 0 else INF, process_group=None)
    run.step(0)
    return story(run.optimizer.last)


def logged(folder: str, group: Any = "world") -> int:
    """Write a log to one path from every rank, or to a path of its own."""
    name = "shared.jsonl" if group == "world" else f"own{dist.get_rank()}.jsonl"
    run = Training("ddp", budget=INF, log=f"{folder}/{name}", process_group=group)
    for step in range(3):
        run.step(step)
    return run.optimizer.last.step


def resumed(kind: str, way: str, budget: float) -> tuple[Any, Any, Any]:
    """Train six steps; and three, save, load into a fresh run, three more."""
    whole = Training(kind, budget=budget, shard=True)
    for step in range(6):
        whole.step(step)
    first, second = (Training(kind, budget=budget, shard=True) for _ in range(2))
    for step in range(3):
        first.step(step)
    own = copy.deepcopy(first.optimizer.state_dict())
    second.plain.load_state_dict(first.plain.state_dict())
    if way == "dcp":
        state = get_optimizer_state_dict(first.model, first.optimizer)
        set_optimizer_state_dict(second.model, second.optimizer, state)
        second.optimizer.load_state_dict({"step_optim": own["step_optim"], **second.inner.state_dict()})
    else:
        second.optimizer.load_state_dict(own)
    for step in range(3, 6):
        second.step(step)
    same = [story(run.optimizer.last) for run in (whole, second)]
    return (whole.weights(), whole.state()) == (second.weights(), second.state()), *same


def restepped() -> dict[str, Any]:
    """Shrink by running the step again."""
    run = Training("ddp", budget=1e-3, shard=True, own=True, shrink="restep")
    for step in range(3):
        run.step(step)
    return {"record": story(run.optimizer.last), "weights": run.weights(), "state": run.state()}
