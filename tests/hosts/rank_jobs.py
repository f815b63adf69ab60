"""What the processes of `test_distributed` do. A job returns plain values: they travel between processes."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributions import Normal
from torch.nn.parallel import DistributedDataParallel

from step_optim import Budget, Ledger, PolicyKL, Steer, STEPOptimizer, TokenKL
from step_optim.host import watchdog
from step_optim.host.ranks import Ranks
from step_optim.step import step as step_module
from tests.hosts.rank_training import INF, Training, control_set, local, pool, story
from tests.models import tiny_llama
from tests.strategies import Policy, policy_problem, wrap


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
    return {"records": records, "weights": run.weights(), "values": run.values(), "state": run.state()}


def movement(kind: str, **options: Any) -> Any:
    """Measure a change of the weights which is the same everywhere."""
    run = Training(kind, budget=INF, shard=True, exact=True, **options)
    kl = run.optimizer._run.kl
    run.step(0)
    run.step(1)
    return kl.sharded, story(run.optimizer.last)


def failing(
    kind: str,
    where: str,
    error: str = "RuntimeError",
    on_error: str = "raise",
    culprit: int = 1,
    nth: int = 1,
    **options: Any,
) -> dict[str, Any]:
    """Train four steps; in the third one rank fails, ``"forward"`` in the midst of the audit's ``nth``.

    Return what each step was here, and the weights.
    """
    errors = {"RuntimeError": RuntimeError, "KeyboardInterrupt": KeyboardInterrupt, "MemoryError": MemoryError}
    guilty = dist.get_rank() == culprit
    now = -1

    def fails(place: str) -> bool:
        return guilty and place == where and now == 2

    def fail(place: str) -> None:
        if fails(place):
            raise errors[error]("as planned")

    def measured(kl: TokenKL) -> TokenKL:
        audit = kl.audit

        def audited() -> Any:
            fail("audit")
            result = audit()
            if fails("nan"):
                bad = replace(result.movement, prompts=(math.nan,) * len(result.movement.prompts or ()), mean=math.nan)
                return replace(result, movement=bad)
            return result

        kl.audit = audited  # type: ignore[method-assign]
        return kl

    run = Training(kind, shard=True, measure=measured, on_error=on_error, **({"budget": INF} | options))
    forwards: list[int] = []

    def in_the_embedding(module: torch.nn.Module, _inputs: Any) -> None:
        if not module.training and now == 2:
            forwards.append(1)
            if len(forwards) == nth:
                fail("forward")

    run.plain.embed.register_forward_pre_hook(in_the_embedding)
    plain_step = run.inner.step

    def inner_step(*args: Any, **kwargs: Any) -> Any:
        result = plain_step(*args, **kwargs)
        fail("inner")
        if fails("weights"):
            with torch.no_grad():
                local(next(iter(run.plain.parameters()))).view(-1)[:1] = math.nan
        return result

    run.inner.step = inner_step  # type: ignore[method-assign]

    def closure() -> Any:
        loss = run.loss(now)
        fail("loss")
        return loss

    def describe(*args: Any) -> Any:
        fail("describe")
        return plain_describe(*args)

    outcomes, exact = [], True
    plain_describe, step_module.decided = step_module.decided, describe  # type: ignore[assignment]
    for now in range(4):
        if where != "loss":
            run.loss(now)
        before = run.picture()
        try:
            run.optimizer.step(closure if where == "loss" else None)
            outcomes.append(str(run.optimizer.last.action))
        except BaseException as raised:
            outcomes.append(f"{type(raised).__name__}: {raised}")
        if outcomes[-1] != "commit":
            exact = exact and run.picture() == before
    step_module.decided = plain_describe
    return {"outcomes": outcomes, "exact": exact, "weights": run.weights(), "last": run.optimizer.last.step}


def without_step(kind: str, left_out: int) -> list[Any]:
    """Train four steps but one, on the gradients that they have in a run where it was rejected."""
    run = Training(kind)
    for step in range(4):
        run.loss(step)
        if step != left_out:
            run.inner.step()
    return run.weights()


def hiding(kind: str) -> list[str]:
    """Fail in the audit of one rank, under a KL closure that makes errors its own: also that of another rank."""
    now = -1

    def measured(kl: TokenKL) -> TokenKL:
        audit = kl.audit

        def audited() -> Any:
            try:
                if dist.get_rank() == 1 and now == 1:
                    raise RuntimeError("as planned")
                return audit()
            except RuntimeError as error:
                raise ArithmeticError("no measurement") from error

        kl.audit = audited  # type: ignore[method-assign]
        return kl

    run = Training(kind, budget=INF, shard=True, measure=measured, on_error="reject")
    outcomes = []
    for now in range(3):
        run.step(now)
        outcomes.append(str(run.optimizer.last.action))
    return outcomes


def uneven() -> list[dict[str, Any]]:
    """Measure with a function that makes more forwards on one rank; FSDP2's root gathers its weights in the first."""

    def measured(kl: TokenKL) -> Any:
        def fn() -> float:
            times = 3 if dist.get_rank() == 0 else 1
            rows = [kl._reading.rows(kl._layout.batches[0], readout="full") for _ in range(times)]
            return float(rows[-1].square().mean())

        return fn

    run = Training("root", budget=INF, measure=measured)
    stories = []
    for step in range(3):
        run.step(step)
        stories.append(story(run.optimizer.last))
    return stories


def averaged() -> list[Any]:
    """Average tensors of this rank, weighted with its number."""
    mine = [torch.full((2,), 1.0 + dist.get_rank()), torch.tensor([complex(0, dist.get_rank())])]
    return [tensor.tolist() for tensor in Ranks().average(mine, weight=1 + 2 * dist.get_rank())]


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


def chosen(kind: str, shard: bool) -> dict[str, float]:
    """Train until the budgets are fixed, and on."""
    run = Training(kind, budget=Budget.auto(8, 0.5), shard=shard, own=True)
    for step in range(11):
        run.step(step)
    return dict(run.optimizer.budget.fixed)


def bounded(kind: str, shard: bool) -> dict[str, float]:
    """Make a step that is judged by confidence bounds."""
    run = Training(kind, budget=Budget(mean=1.0, confidence=0.95), shard=shard)
    run.step(0)
    moved = run.optimizer.last.accepted
    return {"prompts": len(moved.prompts), "error": moved.precision.mean, **run.optimizer.last.accepted_bounds}


def refused(kind: str, shard: bool, controller: str = "Project") -> str:
    """Try a controller where it cannot be."""
    try:
        Training(kind, budget=1.0, controller=controller, shard=shard)
    except ValueError as error:
        return str(error)
    return "taken"


def gradients_aside() -> bool:
    """Measure a gradient under FSDP2 between the loop's backward pass and its step."""
    run = Training("fsdp", budget={"drift": 1e-3}, controller="Steer")
    run.step(0)
    run.loss(1)
    run.plain.set_requires_gradient_sync(False)  # as a loop that accumulates has it for the next backward pass
    before, own = run.picture(), [p.grad for p in run.plain.parameters()]
    kl = run.optimizer._run.kl
    (normal,) = kl.gradients(["drift"], list(run.plain.parameters()), kl.draw(3, 0, ["drift"]))
    assert any(bool(part.any()) for part in normal.gradient)
    assert all(p.grad is gradient for p, gradient in zip(run.plain.parameters(), own, strict=True))
    assert not any(group.reduce_grads for group in run.plain._get_fsdp_state()._fsdp_param_groups)
    return run.picture() == before


def gradient_of_layers(recompute: bool) -> tuple[list[float], int]:
    """Differentiate the drift of a Llama in pieces, layer by layer; how often layers were run for it."""
    model, calls = tiny_llama(layers=2), []
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(lambda *_: calls.append(1))
        fully_shard(layer)
    fully_shard(model)
    kl = TokenKL(model, control_set(), noise_floor=False, micro_batch=4, recompute=recompute)
    kl.anchor()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.sign(p))
    calls.clear()
    (normal,) = kl.gradients(["drift"], list(model.parameters()))
    total = torch.tensor([float(g.double().square().sum()) for g in normal.gradient])
    dist.all_reduce(total)
    return [normal.value, *total.tolist()], len(calls)


def policy_in_pieces(kind: str, output: str) -> dict[str, Any]:
    """Steer a policy of logits, or of a normal distribution, whose weights FSDP2 has split or DDP copied."""
    torch.manual_seed(0)
    plain: nn.Module = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4))
    if kind == "fsdp":
        fully_shard(plain)
    model = DistributedDataParallel(plain) if kind == "ddp" else plain
    observations, others, batch = torch.randn(3, 6, 5)

    def policy(x: torch.Tensor) -> Any:
        return model(x) if output == "logits" else Normal(model(x), 1.0)

    kl = PolicyKL(lambda: policy(observations), model=model, pool=lambda: policy(others), reduction="sum")
    inner = torch.optim.AdamW(model.parameters(), lr=0.05)
    optimizer = STEPOptimizer(inner, kl, budget=Budget(drift=1e-2), controller=Steer())
    actions = []
    for _ in range(6):
        optimizer.zero_grad()
        (model(batch) - 3).square().mean().backward()
        optimizer.step()
        actions.append(str(optimizer.last.action))
    with torch.no_grad():
        return {"values": model(batch).flatten().tolist(), "actions": actions}


def normal_of_parts(name: str, sizes: Sequence[int]) -> tuple[list[float], list[float]]:
    """The gradient of a constraint where every process has observations of its own; and of one that has them all."""
    observations = 2 * torch.randn(sum(sizes), 5, generator=torch.Generator().manual_seed(1))
    first = sum(sizes[: dist.get_rank()])
    mine = observations[first : first + sizes[dist.get_rank()]]

    def moved(inputs: torch.Tensor, group: Any) -> list[float]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4))
        kl = PolicyKL(lambda: model(inputs), {"even": range(0, len(inputs), 2)}, noise_floor=False)
        kl.anchor()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.3 * torch.sign(p))
        inner = torch.optim.SGD(model.parameters(), lr=1.0)
        optimizer = STEPOptimizer(inner, kl, budget=Budget(mean=1.0), process_group=group)
        auditor = optimizer._new_step(None, may_wait=False).auditor
        (normal,) = kl.gradients([name], list(model.parameters()))
        pooled = auditor._pooled_normal(name, normal)
        return [pooled.value, *(value for part in pooled.gradient for value in part.flatten().tolist())]

    return moved(mine, "world"), moved(observations, None)


def steer_on_pieces(sizes: Sequence[int], budget: dict[str, float], pools: Sequence[int] = (3, 3)) -> str:
    """What is said of a policy in pieces whose observations differ between processes."""
    torch.manual_seed(dist.get_rank())
    model = nn.Linear(5, 4)
    fully_shard(model)
    observations = torch.randn(sizes[dist.get_rank()], 5)
    others = torch.randn(pools[dist.get_rank()], 5)
    kl = PolicyKL(lambda: model(observations), model=model, pool=lambda: model(others))
    inner = torch.optim.SGD(model.parameters(), lr=1.0)
    try:
        STEPOptimizer(inner, kl, budget=Budget(**budget), controller=Steer())
    except ValueError as error:
        return str(error)
    return "taken"


def held_out_failing(kind: str, where: str, fails: bool) -> dict[str, Any]:
    """Train four steps with held-out audits; in the third one rank's fails, before or after its forward."""
    now = -1

    def measured(kl: TokenKL) -> TokenKL:
        kl.held_out, kl.every = kl._on(pool()), 1
        method = getattr(kl.held_out, where)

        def guarded() -> Any:
            if fails and now == 2 and dist.get_rank() == 1:
                raise RuntimeError("as planned")
            return method()

        setattr(kl.held_out, where, guarded)
        return kl

    run = Training(kind, budget=INF, own=True, measure=measured, on_error="reject")
    records = []
    for now in range(4):
        run.step(now)
        last = run.optimizer.last
        told = (str(last.action), last.held_out is not None, last.held_out_error or "")
        records.append((*told, last.error, last.accepted.mean))
    return {"records": records, "weights": run.weights()}


def windowed(kind: str, budget: float) -> dict[str, Any]:
    """Three inner steps in one window."""
    run = Training(kind, budget=budget, shard=True, own=True)
    before = run.weights()
    with run.optimizer.window():
        for step in range(3):
            run.step(step)
    return {"record": story(run.optimizer.last), "weights": run.weights(), "moved": run.weights() != before}


def broken_window(kind: str) -> tuple[str, bool, list[Any]]:
    """Fail on one rank at the end of a window; then train on."""
    run = Training(kind, budget=INF, shard=True, own=True)
    before, outcome = run.weights(), "no error"
    try:
        with run.optimizer.window():
            run.step(0)
            if dist.get_rank() == 1:
                raise RuntimeError("as planned")
    except RuntimeError as error:
        outcome = f"{type(error).__name__}: {error}"
    restored = run.weights() == before
    run.step(1)
    return outcome, restored, run.weights()


def alone() -> dict[str, Any]:
    """Let each rank decide by itself: `process_group=None`."""
    run = Training("plain", budget=1e-4 if dist.get_rank() == 0 else INF, process_group=None)
    run.step(0)
    return story(run.optimizer.last)


def in_pairs() -> dict[str, Any]:
    """Ranks 0 and 1 train one policy together, 2 and 3 another."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    pair = dist.get_rank() // 2
    run = Training("plain", budget=[1e-4, INF][pair], process_group=pairs[pair])
    run.step(0)
    return story(run.optimizer.last)


def logged(folder: str, group: Any = "world") -> int:
    """Write a log from every rank, each to a path of its own."""
    run = Training("ddp", budget=INF, log=f"{folder}/rank{dist.get_rank()}/log.jsonl", process_group=group)
    for step in range(3):
        run.step(step)
    return run.optimizer.last.step


def resumed(kind: str, folder: str, way: str, budget: float) -> tuple[Any, Any, Any]:
    """Train six steps; and three, save, load into a fresh run, three more."""
    whole, first, second = (Training(kind, budget=budget, shard=True) for _ in range(3))
    for step in range(6):
        whole.step(step)
    for step in range(3):
        first.step(step)
    own = copy.deepcopy(first.optimizer.state_dict())
    if way == "dcp":
        save(first, folder)
        load(second, folder)
        # torch.distributed.checkpoint knows nothing of STEP's own part: each rank keeps that by itself.
        second.optimizer.load_state_dict({**second.inner.state_dict(), "step_optim": own["step_optim"]})
    else:
        second.plain.load_state_dict(copy.deepcopy(first.plain.state_dict()))
        second.optimizer.load_state_dict(own)
    for step in range(3, 6):
        second.step(step)
    same = [story(run.optimizer.last) for run in (whole, second)]
    return (whole.weights(), whole.state()) == (second.weights(), second.state()), *same


def save(run: Training, folder: str) -> None:
    """Save model and optimizer with torch.distributed.checkpoint."""
    model, optimizer = get_state_dict(run.model, run.optimizer)
    dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=folder)


def load(run: Training, folder: str) -> None:
    """Load them into another run."""
    model, optimizer = get_state_dict(run.model, run.optimizer)
    state = {"model": model, "optimizer": optimizer}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(run.model, run.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def broadcasting() -> list[str]:
    """Audit through DDP, whose forward broadcasts BatchNorm's buffers; in the second step one rank fails before it."""
    torch.manual_seed(0)
    model = DistributedDataParallel(Policy(), find_unused_parameters=True)
    observations = torch.randn(6, 5)
    now, calls = -1, 0

    def policy() -> torch.Tensor:
        nonlocal calls
        calls += 1  # training has moved the buffers: the first one in a step is the reference
        if dist.get_rank() == 1 and now == 1 and calls == 2:
            raise RuntimeError("as planned")
        return model(observations)

    inner = torch.optim.AdamW(model.parameters(), lr=0.01)
    optimizer = STEPOptimizer(inner, PolicyKL(policy), budget=INF, on_error="reject")
    actions = []
    for now in range(3):
        optimizer.zero_grad()
        model(observations + now).square().mean().backward()
        calls = 0
        optimizer.step()
        actions.append(str(optimizer.last.action))
    return actions


def late(folder: str) -> list[str]:
    """Rank 1 comes to the first step, and to the third, only when rank 0 has said twice that it waits; what it said."""
    said: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())
            Path(folder, f"said{len(said)}").touch()

    handler = Handler()
    watchdog.LOGGER.addHandler(handler)
    run = Training("plain", budget=INF)
    with mock.patch.multiple(watchdog, PATIENCE=0.2, AGAIN=0.2):
        for step in range(4):
            run.loss(step)
            if dist.get_rank() == 1 and step in (0, 2):
                while not Path(folder, f"said{step + 2}").exists():
                    time.sleep(0.01)
            run.optimizer.step()
    watchdog.LOGGER.removeHandler(handler)
    return said


def in_stages(folder: str, *, kind: str, shard: bool, frozen_head: bool = False) -> dict[str, Any]:
    """Train two stages with a cap on the path of both; under DDP the second goes on where the first has ended."""
    paths, weights = [], None
    for name in ("sft", "dpo"):
        ledger = Ledger(f"{folder}/ledger.json", stage=name)
        budget, options = Budget(mean=1e-3, path=2e-3), {"own": True, "frozen_head": frozen_head}
        run = Training(kind, budget=budget, shard=shard, ledger=ledger, **options)
        if weights is not None:
            run.model.load_state_dict(weights)
        for step in range(2):
            run.step(step)
        paths.append(run.optimizer.summary()["path_length"])
        weights = copy.deepcopy(run.model.state_dict()) if kind == "ddp" else None
    last = run.optimizer.last
    return {"paths": paths, "drift": last.reference_drift.mean, "left": last.budget.mean, "stages": str(ledger)}


def in_a_later_stage(folder: str) -> None:
    """Begin a stage with observations that each process has for itself."""
    problem = policy_problem()
    wrap(problem, 1e-3, ledger=Ledger(f"{folder}/ledger.json", stage="dpo"))


def apart(folder: str) -> str:
    """Begin a second stage where only the first process sees what the first stage has written."""
    ledger = Ledger(f"{folder}/{dist.get_rank()}/ledger.json", stage="dpo", origin="own")
    run = Training("ddp", budget=1e-3, ledger=ledger)
    try:
        run.step(0)
    except RuntimeError as error:
        return str(error)
    return "went on"
