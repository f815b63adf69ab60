"""What is known of particular optimizers: where they keep copies of the weights, which compute the weights anew."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias

from torch import Tensor
from torch.optim import Optimizer

ParamLike: TypeAlias = "str | Sequence[str] | Callable[[Optimizer], Iterable[tuple[Tensor, Tensor]]]"
"""Keys of ``state[parameter]``, or a function that lists (copy, parameter) pairs."""


def slow_weights(optimizer: Optimizer) -> Iterator[tuple[Tensor, Tensor]]:
    """Those of timm's Lookahead, which keeps them in the state of the optimizer inside it."""
    state = optimizer._base_optimizer.state  # type: ignore[attr-defined]
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        if "lookahead_slow_buff" in state.get(parameter, {}):
            yield state[parameter]["lookahead_slow_buff"], parameter


COPIES: Mapping[str, ParamLike] = {
    "schedulefree.AdamWScheduleFree": ("z",),
    "schedulefree.AdamWScheduleFreeClosure": ("z",),
    "schedulefree.AdamWScheduleFreePaper": ("z",),
    "schedulefree.AdamWScheduleFreeReference": ("x", "y", "z"),
    "schedulefree.RAdamScheduleFree": ("z",),
    "schedulefree.RAdamScheduleFreeClosure": ("z",),
    "schedulefree.SGDScheduleFree": ("z",),
    "schedulefree.SGDScheduleFreeClosure": ("z",),
    "schedulefree.SGDScheduleFreeReference": ("x", "y", "z"),
    "schedulefree.ScheduleFreeWrapper": ("z",),
    "schedulefree.ScheduleFreeWrapperReference": ("x", "y", "z"),
    "pytorch_optimizer.A2Grad": ("x_k",),
    "pytorch_optimizer.Lookahead": ("slow_params",),
    "pytorch_optimizer.Ranger": ("slow_buffer",),
    "pytorch_optimizer.Ranger21": ("lookahead_params",),
    "pytorch_optimizer.ScheduleFreeAdamW": ("z",),
    "pytorch_optimizer.ScheduleFreeRAdam": ("z",),
    "pytorch_optimizer.ScheduleFreeSGD": ("z",),
    "pytorch_optimizer.ScheduleFreeWrapper": ("z",),
    "pytorch_optimizer.SRMM": ("mov_avg_param",),
    # Found by check_optimizer, too, but in no table: their libraries are no dependency of the tests.
    "madgrad.MirrorMADGRAD": ("z",),
    "pytorch_ranger.Ranger": ("slow_buffer",),
    "pytorch_ranger.RangerQH": ("slow_buffer",),
    "pytorch_ranger.RangerVA": ("slow_buffer",),
    "timm.Lookahead": slow_weights,
    "torch_optimizer.A2GradExp": ("x_k",),
    "torch_optimizer.A2GradInc": ("x_k",),
    "torch_optimizer.A2GradUni": ("x_k",),
    "torch_optimizer.Lookahead": ("slow_param",),
}
"""Where known optimizers have copies, by library and class: libraries give one name to different classes.

Each was found by `step_optim.testing.check_optimizer`: without it, less than 0.8 of half a step stays half a step.
"""


_SUMS = "computes the weights anew from sums of gradients"


RECOMPUTED: Mapping[str, str] = {
    "pytorch_optimizer.DAdaptAdaGrad": _SUMS,
    "pytorch_optimizer.DAdaptSGD": _SUMS,
    "pytorch_optimizer.FTRL": _SUMS,
    "pytorch_optimizer.MADGRAD": _SUMS,
    "pytorch_optimizer.Nero": "normalises the weights in every step",
    "dadaptation.DAdaptAdaGrad": _SUMS,
    "dadaptation.DAdaptSGD": _SUMS,
    "madgrad.MADGRAD": _SUMS,
    "timm.MADGRAD": _SUMS,
    "torch_optimizer.MADGRAD": _SUMS,
}
"""Why no point between two weights of these optimizers can be kept: no state moved along makes half a step last."""


_RATE = "estimates one learning rate over all parameters"


JOINT: Mapping[str, str] = {
    "torch.LBFGS": "approximates one Hessian over all parameters",
    "pytorch_optimizer.LBFGS": "approximates one Hessian over all parameters",
    "prodigyopt.Prodigy": _RATE,
    "pytorch_optimizer.Prodigy": _RATE,
    "pytorch_optimizer.DAdaptAdam": _RATE,
    "pytorch_optimizer.DAdaptAdan": _RATE,
    "pytorch_optimizer.DAdaptLion": _RATE,
    "pytorch_optimizer.DAdaptAdaGrad": _RATE,
    "pytorch_optimizer.DAdaptSGD": _RATE,
    "dadaptation.DAdaptAdam": _RATE,
    "dadaptation.DAdaptAdan": _RATE,
    "dadaptation.DAdaptLion": _RATE,
    "dadaptation.DAdaptAdaGrad": _RATE,
    "dadaptation.DAdaptSGD": _RATE,
}
"""Why the state of these optimizers belongs to all parameters together: their papers and sources say so, though they
keep it under the first parameter, or in the groups. What others keep outside of parameters is seen in the first step.
"""


def known_copies(optimizer: Optimizer) -> ParamLike:
    """Return where the copies of the weights are, for an optimizer that is known to have them."""
    return next((COPIES[name] for name in _names(optimizer) if name in COPIES), ())


def why_recomputed(optimizer: Optimizer) -> str | None:
    """Return why interpolated weights would not last in this optimizer; None if they do, as far as is known."""
    return next((RECOMPUTED[name] for name in _names(optimizer) if name in RECOMPUTED), None)


def why_joint(optimizer: Optimizer) -> str | None:
    """Return why no part of this optimizer's state is that of some parameters alone; None if that is not known."""
    return next((JOINT[name] for name in _names(optimizer) if name in JOINT), None)


def steps_in_backward(optimizer: Optimizer) -> bool:
    """Whether the weights move before `step()` is called: there is no candidate to audit."""
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    return (
        hasattr(optimizer, "fused_backward")  # LOMO and AdaLOMO, of any library
        or "transformers.LayerWiseDummyOptimizer" in _names(optimizer)
        or any(hasattr(p, "_in_backward_optimizers") for p in parameters)
    )


def _names(optimizer: Optimizer) -> list[str]:
    """Library and class, of the class itself and of those that it derives from."""
    return [f"{cls.__module__.partition('.')[0]}.{cls.__name__}" for cls in type(optimizer).__mro__]
