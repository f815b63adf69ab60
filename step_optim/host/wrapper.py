"""An optimizer that behaves as the one inside it: the torch contract, without any policy of its own."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import MethodType
from typing import Any

from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from step_optim.host import hooks

_HOOKS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)


def _of_the_inner(name: str) -> property:
    """An attribute that is read, set and deleted on the inner optimizer."""
    return property(
        lambda self: getattr(self._inner, name),
        lambda self, value: setattr(self._inner, name, value),
        lambda self: delattr(self._inner, name),
    )


class Watched:
    """A method of the inner optimizer (`first_step`, `swap_swa_sgd`, ...) that is called inside a context.

    In all else it is that method: ``__func__`` and ``__self__``, equality, its
    signature; a pickle or a copy is one of the method.

    Args:
        method: a bound method.
        calling: makes the context, given the method's name.
    """

    def __init__(self, method: MethodType, calling: Callable[[str], AbstractContextManager[None]]) -> None:
        functools.update_wrapper(self, method)
        self._method, self._calling = method, calling

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method."""
        with self._calling(self._method.__name__):
            return self._method(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Read what the method has (`__func__`, `__self__`, ...)."""
        if name == "_method":  # a copy that is being made
            raise AttributeError(name)
        return getattr(self._method, name)

    def __eq__(self, other: object) -> bool:
        return bool(self._method == (other._method if isinstance(other, Watched) else other))

    def __hash__(self) -> int:
        return hash(self._method)

    def __reduce__(self) -> Any:
        return getattr, (self._method.__self__, self._method.__name__)

    def __repr__(self) -> str:
        return repr(self._method)


class OptimizerWrapper(Optimizer):
    """Forwards everything to an inner optimizer.

    It subclasses `Optimizer` because schedulers and Trainers ask isinstance,
    and it does not call ``Optimizer.__init__``: that would make a second copy
    of the parameter groups, which goes stale with the first load_state_dict.
    """

    # GradScaler itself unscales, and skips the steps that overflow: those are no proposals. What a user sets for a
    # fused kernel goes where the kernel reads it.
    _step_supports_amp_scaling = False
    grad_scale = _of_the_inner("grad_scale")
    found_inf = _of_the_inner("found_inf")

    def __init__(self, optimizer: Optimizer) -> None:
        self._inner = optimizer
        self._fresh_hooks()

    def _fresh_hooks(self) -> None:
        for name in _HOOKS:
            setattr(self, name, OrderedDict())

    @property
    def optimizer(self) -> Optimizer:
        """The inner optimizer."""
        return self._inner

    # FSDP2 and DeepSpeed assign into these; load_state_dict rebinds them. So they are never copied.
    @property
    def state(self) -> Any:
        """The inner optimizer's state."""
        return self._inner.state

    @state.setter
    def state(self, value: Any) -> None:
        self._inner.state = value

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The inner optimizer's parameter groups."""
        return self._inner.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self._inner.param_groups = value

    @property
    def defaults(self) -> dict[str, Any]:
        """The inner optimizer's defaults."""
        return self._inner.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self._inner.defaults = value

    def __getattr__(self, name: str) -> Any:
        """Read what only the inner optimizer has (`d`, `is_paged`, ...)."""
        inner = self.__dict__.get("_inner")
        if inner is None or name.startswith("__"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        value = getattr(inner, name)
        return Watched(value, self._calling) if isinstance(value, MethodType) else value

    def _calling(self, name: str) -> AbstractContextManager[None]:
        """Return what a method of the inner optimizer that the wrapper does not have is called in."""
        return nullcontext()

    def __setattr__(self, name: str, value: Any) -> None:
        """Write a public attribute that only the inner optimizer has (`rho`, `d0`, ...) where it is read."""
        if self._is_inner_attribute(name):
            setattr(self._inner, name, value)
        else:
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        """Delete an attribute where `__setattr__` writes it."""
        if self._is_inner_attribute(name):
            delattr(self._inner, name)
        else:
            super().__delattr__(name)

    def _is_inner_attribute(self, name: str) -> bool:
        # Hosts keep notes of their own here (Lightning, schedulers): those have private or new names.
        inner = self.__dict__.get("_inner")
        own = name.startswith("_") or name in self.__dict__ or hasattr(type(self), name)
        return inner is not None and not own and hasattr(inner, name)

    def zero_grad(self, set_to_none: bool | None = None, **kwargs: Any) -> None:
        """Reset the gradients of the inner optimizer's parameters."""
        if set_to_none is not None:  # accelerate looks for the name in the signature
            kwargs["set_to_none"] = set_to_none
        self._inner.zero_grad(**kwargs)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group to the inner optimizer."""
        self._inner.add_param_group(param_group)

    def train(self, mode: bool = True) -> None:
        """Forward to the inner optimizer, if it has modes (schedule-free ones do)."""
        switch = getattr(self._inner, "train" if mode else "eval", None)
        if switch is not None:
            switch()

    def eval(self) -> None:
        """Forward to the inner optimizer, if it has modes."""
        self.train(False)

    def _run_hooks(self, name: str, *args: Any) -> list[Any]:
        """Run the wrapper's own instance hooks."""
        return [hook(self, *args) for hook in list(getattr(self, name).values())]

    def _run_step_pre_hooks(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        """Run the hooks before a step, in torch's order; one may replace the arguments by returning (args, kwargs)."""
        args = (self, *args)
        for hook in [*hooks.pre_hooks(), *self._optimizer_step_pre_hooks.values()]:
            replaced = hook(self, args, kwargs)
            if replaced is not None:
                if not isinstance(replaced, tuple) or len(replaced) != 2:
                    raise RuntimeError(f"a step pre-hook returned {replaced!r:.60}; return None or (args, kwargs)")
                args, kwargs = replaced
        return args[1:], kwargs

    def _run_step_post_hooks(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run the hooks after a step, in torch's order."""
        for hook in [*self._optimizer_step_post_hooks.values(), *hooks.post_hooks()]:
            hook(self, (self, *args), kwargs)

    def _own_state(self) -> dict[str, Any]:
        """What the wrapper adds to the checkpoint: plain values and tensors."""
        return {}

    def _load_own_state(self, state: Mapping[str, Any] | None) -> Callable[[], None]:
        """Check the wrapper's part of a checkpoint (None if it has none); return what takes it over."""
        return lambda: None

    def state_dict(self) -> dict[str, Any]:
        """Return the inner optimizer's own state dict, with one more key, ``"step_optim"``."""
        self._run_hooks("_optimizer_state_dict_pre_hooks")
        state = {**self._inner.state_dict(), "step_optim": self._own_state()}
        for hook in list(self._optimizer_state_dict_post_hooks.values()):
            replaced = hook(self, state)
            state = state if replaced is None else replaced
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load the wrapper's checkpoint, or that of a bare inner optimizer."""
        state = dict(state_dict)
        for hook in list(self._optimizer_load_state_dict_pre_hooks.values()):
            replaced = hook(self, state)
            state = state if replaced is None else dict(replaced)
        take_over = self._load_own_state(state.pop("step_optim", None))  # what is refused is refused first
        self._inner.load_state_dict(state)
        take_over()
        self._run_hooks("_optimizer_load_state_dict_post_hooks")

    def __getstate__(self) -> dict[str, Any]:
        """Everything but hooks and a scheduler's patch of ``step``, which torch drops too."""
        return {name: value for name, value in vars(self).items() if name not in (*_HOOKS, "step")}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """Take over attributes; torch's own version would patch a second step around ours."""
        self.__dict__.update(state)
        self._fresh_hooks()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._inner!r})"


def hooked(step: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a ``step`` so that torch does not wrap it: it runs the hooks by itself, around the decision.

    And keep it out of compiled code, where no audit can run; the inner step
    may be compiled.
    """
    step.hooked = True  # type: ignore[attr-defined]
    return _disable_dynamo(step)
