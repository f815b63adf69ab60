"""Every optimizer that `optimizer_table.py` tries, and how to make and train those that want something unusual."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import bitsandbytes
import pytorch_optimizer
import schedulefree
import torch
import torch.distributed as dist
import torchao.optim
import transformers
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from step_optim.testing import Factory, TrainStep, train_step


@dataclass(frozen=True)
class Entry:
    """One optimizer."""

    library: str
    name: str
    factory: Factory
    train: TrainStep = train_step

    @property
    def title(self) -> str:
        """Unique in the zoo."""
        return f"{self.library}.{self.name}"


def with_closure(optimizer: Optimizer, loss: Callable[[], Tensor]) -> None:
    """Hand step() a loss closure, and compute a gradient before, as the SAM family wants it."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    closure()
    optimizer.step(closure)


def with_loss_value(optimizer: Optimizer, loss: Callable[[], Tensor]) -> None:
    """Hand step() a closure that only returns the loss of the gradient at hand, as AliG wants it."""
    optimizer.zero_grad()
    value = loss()
    value.backward()
    optimizer.step(lambda: float(value))


def with_graph(optimizer: Optimizer, loss: Callable[[], Tensor]) -> None:
    """Keep the graph of the gradient: Hessian diagonals are estimated through it."""
    optimizer.zero_grad()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for p, gradient in zip(parameters, torch.autograd.grad(loss(), parameters, create_graph=True), strict=True):
        p.grad = gradient  # backward(create_graph=True) warns of a reference cycle
    optimizer.step()
    optimizer.zero_grad()


def with_hessian(optimizer: Optimizer, loss: Callable[[], Tensor]) -> None:
    """Hand step() an estimate of the Hessian's diagonal: that of Gauss and Newton will do."""
    optimizer.zero_grad()
    loss().backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.step(hessian=[p.grad.square() for p in parameters])


def with_sparse_gradients(optimizer: Optimizer, loss: Callable[[], Tensor]) -> None:
    """Make the gradients sparse."""
    optimizer.zero_grad()
    loss().backward()
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = p.grad.to_sparse()
    optimizer.step()


def with_own_backward(optimizer: Optimizer, loss: Callable[[], Tensor]) -> None:
    """Leave the backward pass to the optimizer, which scales the loss."""
    optimizer.zero_grad()
    optimizer.backward(loss())
    optimizer.step()


def with_accumulated_norm(optimizer: Optimizer, loss: Callable[[], Tensor]) -> None:
    """Step inside the backward pass, as LOMO does."""
    optimizer.fused_backward(loss(), lr=1e-3)


def module_of(parameters: list[nn.Parameter]) -> nn.Module:
    """The model that the parameters are of, for optimizers that take a model."""
    module = nn.Module()
    for index, parameter in enumerate(parameters):
        module.register_parameter(f"weight{index}", parameter)
    return module


def matrices(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    """Without vectors, which some optimizers refuse."""
    return [p for p in parameters if p.dim() == 2]


def muon_groups(parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
    """Matrices by Muon, the rest by its AdamW."""
    return [
        {"params": matrices(parameters), "use_muon": True},
        {"params": [p for p in parameters if p.dim() != 2], "use_muon": False},
    ]


def in_one_process(cls: Any) -> Any:
    """A class of optimizers that ask for a process group."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return cls


def sophia(cls: Any) -> Factory:
    """With the Hessian estimated at every other step, so that a short run has both."""
    return lambda parameters: cls(parameters, lr=1e-3, update_period=2)


def classes(module: Any) -> Iterator[tuple[str, type[Optimizer]]]:
    """The optimizers that a module exports."""
    for name, cls in sorted(vars(module).items()):
        if inspect.isclass(cls) and issubclass(cls, Optimizer) and cls is not Optimizer and not name.startswith("_"):
            yield name, cls


def of(cls: Any, **options: Any) -> Factory:
    """A factory for the usual case."""
    return lambda parameters: cls(parameters, **options)


def torch_optim() -> Iterator[Entry]:
    """All of torch.optim, and the flags that change what is done or kept."""
    special = {
        "Adafactor": {"lr": 1e-2},
        "LBFGS": {"lr": 0.1, "max_iter": 3},
        "Rprop": {"lr": 1e-3},
        "SGD": {"lr": 0.1, "momentum": 0.9},
    }
    trains = {"LBFGS": with_closure, "SparseAdam": with_sparse_gradients}
    for name, cls in classes(torch.optim):
        if name == "Muon":
            yield Entry("torch", name, lambda parameters: torch.optim.Muon(matrices(parameters), lr=1e-2))
        else:
            yield Entry("torch", name, of(cls, **special.get(name, {"lr": 1e-3})), trains.get(name, train_step))
    yield Entry("torch", "AdamW(amsgrad)", of(AdamW, lr=1e-3, amsgrad=True))
    yield Entry("torch", "AdamW(fused)", of(AdamW, lr=1e-3, fused=True))
    yield Entry("torch", "AdamW(foreach)", of(AdamW, lr=1e-3, foreach=True))
    yield Entry("torch", "AdamW(tensor lr)", lambda parameters: AdamW(parameters, lr=torch.tensor(1e-3)))
    yield Entry(
        "torch", "LBFGS(strong_wolfe)", of(torch.optim.LBFGS, line_search_fn="strong_wolfe", max_iter=3), with_closure
    )
    yield Entry("torch", "RMSprop(centered, momentum)", of(torch.optim.RMSprop, lr=1e-3, centered=True, momentum=0.9))


def bitsandbytes_optim() -> Iterator[Entry]:
    """All of bitsandbytes."""
    special = {"SGD": {"lr": 0.1, "momentum": 0.9}, "LARS": {"lr": 0.1, "momentum": 0.9}}
    for name, cls in classes(bitsandbytes.optim):
        family = name.removeprefix("Paged").removeprefix("Pytorch").removesuffix("8bit").removesuffix("32bit")
        yield Entry("bitsandbytes", name, of(cls, **special.get(family, {"lr": 1e-3})))


def torchao_optim() -> Iterator[Entry]:
    """All of torchao's low-bit optimizers; the copies of CPUOffloadOptimizer need an accelerator."""
    for name, cls in classes(torchao.optim):
        if name != "CPUOffloadOptimizer":
            yield Entry("torchao", name, of(cls, lr=1e-3))
    yield Entry(
        "torchao", "_AdamW(bf16_stochastic_round)", of(torchao.optim._AdamW, lr=1e-3, bf16_stochastic_round=True)
    )
    yield Entry("torchao", "CPUOffloadOptimizer", of(torchao.optim.CPUOffloadOptimizer, optimizer_class=AdamW, lr=1e-3))


def schedulefree_optim() -> Iterator[Entry]:
    """All of schedulefree."""
    for name, cls in classes(schedulefree):
        if "Wrapper" in name:
            continue
        train = with_closure if "Closure" in name else train_step
        yield Entry("schedulefree", name, of(cls, lr=1.0 if "SGD" in name else 1e-2), train)
    for name in ("ScheduleFreeWrapper", "ScheduleFreeWrapperReference"):
        wrapper = getattr(schedulefree, name)
        for base in (torch.optim.SGD, torch.optim.RMSprop, AdamW):
            yield Entry(
                "schedulefree",
                f"{name}({base.__name__})",
                lambda p, wrapper=wrapper, base=base: wrapper(
                    base(p, lr=0.3 if base is torch.optim.SGD else 1e-2), momentum=0.9
                ),
            )


def transformers_optim() -> Iterator[Entry]:
    """Adafactor, the only optimizer of transformers' own."""
    yield Entry("transformers", "Adafactor", of(transformers.Adafactor))
    fixed = {"lr": 1e-3, "scale_parameter": False, "relative_step": False}
    yield Entry("transformers", "Adafactor(fixed lr)", of(transformers.Adafactor, **fixed))
    yield Entry("transformers", "Adafactor(fixed lr, beta1)", of(transformers.Adafactor, **fixed, beta1=0.9))


def pytorch_optimizer_optim() -> Iterator[Entry]:
    """All that pytorch_optimizer lists, and the wrappers that it does not list (but GSAM, which keeps its own loss)."""
    for name in pytorch_optimizer.get_supported_optimizers():
        cls = pytorch_optimizer.load_optimizer(name)
        if cls.__module__.startswith("torch."):
            continue
        factory, train = SPECIAL.get(cls.__name__, (None, None))
        yield Entry("pytorch_optimizer", cls.__name__, factory or of(cls), train or train_step)
    for name, (factory, train) in WRAPPERS.items():
        yield Entry("pytorch_optimizer", name, factory, train or train_step)


PO = pytorch_optimizer
_fixed = nn.Identity()
SPECIAL: dict[str, tuple[Factory | None, TrainStep | None]] = {
    "AdaGO": (lambda p: PO.AdaGO(muon_groups(p)), None),
    "AdaHessian": (None, with_graph),
    "AdaLOMO": (lambda p: PO.AdaLOMO(module_of(p)), with_accumulated_norm),
    "AdaMuon": (lambda p: PO.AdaMuon(muon_groups(p)), None),
    "AdamMini": (lambda p: PO.AdamMini(module_of(p), lr=1e-3), None),
    "AdaShift": (lambda p: PO.AdaShift(p, keep_num=3), None),
    "AliG": (None, with_loss_value),
    "BSAM": (lambda p: PO.BSAM(p, num_data=16), with_closure),
    "DAdaptAdaGrad": (lambda p: PO.DAdaptAdaGrad(p, d0=1e-3), None),
    "DAdaptAdam": (lambda p: PO.DAdaptAdam(p, d0=1e-3), None),
    "DAdaptAdan": (lambda p: PO.DAdaptAdan(p, d0=1e-3), None),
    "DAdaptLion": (lambda p: PO.DAdaptLion(p, d0=1e-3), None),
    "DAdaptSGD": (lambda p: PO.DAdaptSGD(p, d0=1e-3), None),
    "DeMo": (lambda p: in_one_process(PO.DeMo)(p), None),
    "DistributedMuon": (lambda p: in_one_process(PO.DistributedMuon)(muon_groups(p)), None),
    "FAdam": (lambda p: PO.FAdam(p, weight_decay=0.0), None),  # whose default takes a tenth of the weights away
    "Kron": (lambda p: PO.Kron(p, memory_save_mode="all_diag"), None),
    "LARS": (lambda p: PO.LARS(p, lr=1.0), None),  # of which it takes a thousandth; less is bfloat16's rounding
    "LOMO": (lambda p: PO.LOMO(module_of(p)), with_accumulated_norm),
    "Magma": (lambda p: PO.Magma(AdamW(p, lr=1e-3)), None),
    "Muon": (lambda p: PO.Muon(muon_groups(p)), None),
    "MuonClip": (lambda p: PO.MuonClip(muon_groups(p)), None),
    "NorMuon": (lambda p: PO.NorMuon(muon_groups(p)), None),
    "Prodigy": (lambda p: PO.Prodigy(p, d0=1e-3), None),
    "Ranger": (lambda p: PO.Ranger(p, lr=0.1), None),  # it warms up: smaller steps are bfloat16's rounding
    "Ranger21": (lambda p: PO.Ranger21(p, num_iterations=20), None),
    "SpectralSphere": (lambda p: PO.SpectralSphere(matrices(p)), None),
    "SophiaH": (sophia(PO.SophiaH), with_graph),
}
WRAPPERS: dict[str, tuple[Factory, TrainStep | None]] = {
    "Lookahead(AdamW)": (lambda p: PO.Lookahead(AdamW(p, lr=1e-3)), None),
    "Lookahead(SGD, pullback)": (
        lambda p: PO.Lookahead(torch.optim.SGD(p, lr=0.1, momentum=0.9), pullback_momentum="pullback"),
        None,
    ),
    "TRAC(AdamW)": (lambda p: PO.TRAC(AdamW(p, lr=1e-3), s_prev=1e-2), None),
    "OrthoGrad(AdamW)": (lambda p: PO.OrthoGrad(AdamW(p, lr=1e-3)), None),
    "PCGrad(AdamW)": (lambda p: PO.PCGrad(AdamW(p, lr=1e-3)), None),
    "ScheduleFreeWrapper(AdamW)": (lambda p: PO.ScheduleFreeWrapper(AdamW(p, lr=1e-2)), None),
    "SafeFP16Optimizer(AdamW)": (lambda p: PO.SafeFP16Optimizer(AdamW(p, lr=1e-3)), with_own_backward),
    "SAM(AdamW)": (lambda p: PO.SAM(p, AdamW, lr=1e-3), with_closure),
    "FriendlySAM(AdamW)": (lambda p: PO.FriendlySAM(p, AdamW, lr=1e-3), with_closure),
    "LookSAM(AdamW)": (lambda p: PO.LookSAM(p, AdamW, lr=1e-3), with_closure),
    "WSAM(AdamW)": (lambda p: PO.WSAM(module_of(p), p, AdamW, lr=1e-3), with_closure),
    "AdaHessian(hessian)": (lambda p: PO.AdaHessian(p), with_hessian),
    "SophiaH(hessian)": (sophia(PO.SophiaH), with_hessian),
}


def zoo() -> list[Entry]:
    """All of them."""
    libraries = (
        torch_optim,
        bitsandbytes_optim,
        torchao_optim,
        schedulefree_optim,
        transformers_optim,
        pytorch_optimizer_optim,
    )
    return [entry for library in libraries for entry in library()]
