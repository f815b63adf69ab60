"""Shared strategies: training problems with a policy, an optimizer, a KL closure and a way to take their bits."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from step_optim import (
    Budget,
    Controller,
    ControlSet,
    Gate,
    Interpolate,
    KLClosure,
    PolicyKL,
    Project,
    Steer,
    STEPOptimizer,
    TokenKL,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


class Policy(nn.Module):
    """A small policy with everything that a careless audit would disturb: dropout, BatchNorm, a tied weight."""

    def __init__(self, dtype: torch.dtype = torch.float32, mixed: bool = False) -> None:
        super().__init__()
        self.body = nn.Linear(5, 8).to(dtype)
        self.norm = nn.BatchNorm1d(8).to(dtype)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(8, 4).to(torch.float32 if mixed else dtype)
        self.scalar = nn.Parameter(torch.tensor(1.0, dtype=dtype))
        self.empty = nn.Parameter(torch.zeros(0, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.drop(self.norm(torch.tanh(self.body(x.to(self.body.weight.dtype)))))
        return self.head((hidden * self.scalar).to(self.head.weight.dtype))


class Bigram(nn.Module):
    """The smallest language model: the next token depends on this one. Returns logits [B, T, V]."""

    def __init__(self, vocab: int = 13, width: int = 6) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.lm_head = nn.Linear(width, vocab, bias=True)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.lm_head(torch.tanh(self.embed(input_ids)))


INNER: dict[str, Callable[[list[nn.Parameter], float], torch.optim.Optimizer]] = {
    "AdamW": lambda p, lr: torch.optim.AdamW(p, lr=lr),
    "SGD": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9),
    "RMSprop": lambda p, lr: torch.optim.RMSprop(p, lr=lr),
    "Adagrad": lambda p, lr: torch.optim.Adagrad(p, lr=lr),
    "NAdam": lambda p, lr: torch.optim.NAdam(p, lr=lr),
    "Rprop": lambda p, lr: torch.optim.Rprop(p, lr=lr),
    "ASGD": lambda p, lr: torch.optim.ASGD(p, lr=lr),
    "tensor lr": lambda p, lr: torch.optim.Adam(p, lr=torch.tensor(lr), foreach=False),
}


@dataclass
class Problem:
    """A model in training, reproducible from its seed."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    kl: KLClosure
    batch: Callable[[int], Tensor]

    def backward(self, step: int) -> None:
        """Put the gradient of step ``step`` into `.grad`, through a train-mode forward that draws random numbers."""
        self.model.train()
        self.optimizer.zero_grad()
        loss = self.loss(step)
        loss.backward()

    def loss(self, step: int) -> Tensor:
        out = self.model(self.batch(step))
        return out.float().square().mean() - out.float().log_softmax(-1)[..., 0].mean()


def policy_problem(
    seed: int = 0, *, inner: str = "AdamW", lr: float = 0.05, dtype: str = "fp32", mixed: bool = False
) -> Problem:
    torch.manual_seed(seed)
    model = Policy(DTYPES[dtype], mixed)
    observations = torch.randn(6, 5)
    data = torch.randn(64, 7, 5)
    slices = {"a": [0, 1, 2], "b": [2, 3], "c": [5]}
    kl = PolicyKL(lambda: model(observations), slices, noise_floor=False)  # budgets below bf16's are set on purpose
    return Problem(model, INNER[inner](list(model.parameters()), lr), kl, lambda step: data[step % 64])


def token_problem(seed: int = 0, *, inner: str = "AdamW", lr: float = 0.05, freeze_head: bool = False) -> Problem:
    torch.manual_seed(seed)
    model = Bigram()
    model.lm_head.requires_grad_(not freeze_head)
    control = ControlSet.from_ids([[1, 2], [3], [4, 5, 6]], [[7, 8, 9], [10], [11, 12]], slices={"a": [0], "b": [1, 2]})
    data = torch.randint(0, 13, (64, 3, 6))
    trained = [p for p in model.parameters() if p.requires_grad]
    return Problem(model, INNER[inner](trained, lr), TokenKL(model, control), lambda step: data[step % 64])


def controllers() -> st.SearchStrategy[Controller]:
    return (
        st.builds(Gate, patience=st.none() | st.integers(1, 3), on_reject=st.sampled_from(["restore", "keep_state"]))
        | st.builds(
            Interpolate,
            search=st.sampled_from(["model", "bisect", "backtrack"]),
            strict=st.booleans(),
            on_shrink=st.sampled_from(["keep_state", "restore"]),
        )
        | st.builds(Steer, corrections=st.integers(1, 2), aim=st.sampled_from([0.7, 0.9]))
        | st.builds(Project, steps=st.integers(1, 2), on_shrink=st.sampled_from(["keep_state", "restore"]))
    )


def budgets() -> st.SearchStrategy[Budget]:
    """From so tight that every step is over it to so loose that none is."""
    size = st.floats(-8, 0).map(lambda exponent: 10.0**exponent)
    return st.builds(Budget, mean=size, slices=st.none() | size) | st.builds(Budget, slices=size)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    seed = draw(st.integers(0, 10_000))
    inner = draw(st.sampled_from(sorted(INNER)))
    lr = draw(st.sampled_from([1e-3, 0.03, 0.3]))
    if draw(st.booleans()):
        return token_problem(seed, inner=inner, lr=lr, freeze_head=draw(st.booleans()))
    dtype = draw(st.sampled_from(sorted(DTYPES)))
    return policy_problem(seed, inner=inner, lr=lr, dtype=dtype, mixed=draw(st.booleans()))


def bits(value: Any) -> Any:
    """A comparable picture of a nested value: bytes and dtype of tensors, types and order of containers."""
    if isinstance(value, Tensor):
        if value.layout is torch.sparse_coo:
            return ("sparse", bits(value._indices()), bits(value._values()))
        plain = torch.view_as_real(value.detach()) if value.is_complex() else value.detach()
        return (
            (str(value.dtype), tuple(value.shape), plain.cpu().contiguous().view(torch.uint8).numpy().tobytes())
            if (plain.dim())
            else (str(value.dtype), (), plain.reshape(1).view(torch.uint8).numpy().tobytes())
        )
    if isinstance(value, dict):
        return [
            (str(type(value)), str(key) if not isinstance(key, Tensor) else id(key), bits(v))
            for key, v in value.items()
        ]
    if isinstance(value, (list, tuple)):
        return [str(type(value)), *(bits(item) for item in value)]
    if isinstance(value, float):
        return repr(value)
    return value if isinstance(value, (int, str, bool, type(None))) else repr(value)


def identities(value: Any) -> Iterator[int]:
    """Ids of all tensors and containers in a nested value."""
    if isinstance(value, Tensor):
        yield id(value)
    elif isinstance(value, dict):
        yield id(value)
        for item in value.values():
            yield from identities(item)
    elif isinstance(value, list):
        yield id(value)
        for item in value:
            yield from identities(item)


def picture(model: nn.Module, optimizer: torch.optim.Optimizer, *, rng: bool = True) -> dict[str, Any]:
    """Everything that a rejected step must leave bit for bit as it was."""
    inner = getattr(optimizer, "optimizer", optimizer)
    taken = {
        "parameters": [bits(p) for p in model.parameters()],
        "buffers": [bits(b) for b in model.buffers()],
        "gradients": [None if p.grad is None else (id(p.grad), bits(p.grad)) for p in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "state": bits(dict(inner.state)),
        "state objects": list(identities(dict(inner.state)))[1:],
        "groups": [bits({k: v for k, v in group.items() if k != "params"}) for group in inner.param_groups],
        "attributes": bits(
            {k: v for k, v in vars(inner).items() if k not in ("state", "param_groups") and "hook" not in k}
        ),
    }
    if rng:
        taken["rng"] = (bits(torch.get_rng_state()), repr(random.getstate()), repr(np.random.get_state()))
    return taken


def wrap(
    problem: Problem, budget: Budget | float, controller: Controller | None = None, **options: Any
) -> STEPOptimizer:
    """Put STEP around a problem's optimizer."""
    controller = copy.deepcopy(controller) if controller is not None else None
    return STEPOptimizer(problem.optimizer, kl=problem.kl, budget=budget, controller=controller, **options)
