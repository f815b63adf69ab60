"""What the processes of `test_partial_ranks` do. A job returns plain values: they travel between processes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from step_optim import Gate, Interpolate, STEPOptimizer, TokenKL
from tests.hosts.rank_training import Training, batch, control_set, story
from tests.strategies import Bigram, bits


def partial_steps(*, shard: bool, gate: bool) -> dict[str, Any]:
    """An actor and a critic under DDP, each process with data of its own; three steps over budget."""
    torch.manual_seed(0)
    actor, critic = DistributedDataParallel(Bigram()), DistributedDataParallel(nn.Linear(5, 1))
    kl = TokenKL(actor, control_set(), shard=shard, check_parameters=False)
    optimizer = STEPOptimizer(
        torch.optim.AdamW([*actor.parameters(), *critic.parameters()], lr=0.05),
        kl=kl,
        budget=1e-5,
        controller=Gate() if gate else Interpolate(),
        keep="unread",
    )
    bare = torch.optim.AdamW((alone := nn.Linear(5, 1)).parameters(), lr=0.05)
    alone.load_state_dict(critic.module.state_dict())
    records = []
    for step in range(3):
        optimizer.zero_grad()
        ids = batch(step, own=True)
        actor(ids)[..., 0].mean().backward()
        critic(ids.float()).square().mean().backward()
        for ours, theirs in zip(alone.parameters(), critic.parameters(), strict=True):
            ours.grad = theirs.grad.clone()
        optimizer.step()
        bare.step()
        records.append(story(optimizer.last))
    return {
        "records": records,
        "names": optimizer.describe()["keep"]["parameters"],
        "actor": bits([*actor.parameters()]),
        "critic": bits([*critic.parameters()]),
        "alone": bits([*alone.parameters()]),
    }


def splits() -> str:
    """FSDP2 has split the weights."""
    try:
        Training("fsdp", budget=1e-3, keep="unread")
    except ValueError as error:
        return str(error)
    return ""


def finds_something_else(step: int) -> list[str]:
    """One process's audit fails while it is measured what is read; then all train on."""
    run = Training("ddp", budget=1e-5, keep="unread")
    measure, count = run.optimizer.kl.audit, 0

    def fails() -> Any:
        nonlocal count
        count += 1
        if dist.get_rank() == 1 and count == step:
            raise RuntimeError("on purpose")
        return measure()

    run.optimizer.kl.audit = fails
    told = []
    try:
        run.step(0)
    except Exception as error:
        told.append(type(error).__name__)
    run.step(1)
    return [*told, repr(run.picture())]
