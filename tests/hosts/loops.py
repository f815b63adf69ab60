"""The plainest training loop, and a network that shows most of what may go wrong in one."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from step_optim import Budget

OBSERVATIONS = torch.linspace(-1, 1, 30).reshape(6, 5)
INF = Budget(mean=math.inf)


class Net(nn.Module):
    """Dropout and BatchNorm; unlike in `Policy` every parameter is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.BatchNorm1d(8), nn.Dropout(0.3))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def data(step: int, rows: int = 8) -> tuple[Tensor, Tensor]:
    """Observations [rows, 5] and actions [rows], a function of the step alone."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(rows, 5, generator=generator), torch.randint(0, 4, (rows,), generator=generator)


def loss_of(model: Callable[[Tensor], Tensor], step: int) -> Tensor:
    x, y = data(step)
    return nn.functional.cross_entropy(model(x).float(), y)


def adamw(model: nn.Module, lr: float = 0.02) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=lr)


def momentum(model: nn.Module, lr: float = 0.2) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: range,
    *,
    forward: Callable[[Tensor], Tensor] | None = None,
    after: Callable[[int], None] = lambda step: None,
) -> list[float]:
    """The plainest loop; ``after`` runs at the end of each step."""
    losses = []
    for step in steps:
        model.train()
        optimizer.zero_grad()
        loss = loss_of(model if forward is None else forward, step)
        loss.backward()
        optimizer.step()
        after(step)
        losses.append(float(loss.detach()))
    return losses
