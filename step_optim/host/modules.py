"""Modules inside modules: what wraps a model, and what FSDP2 has split."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from torch import nn


def sharded(modules: Iterable[nn.Module]) -> list[Any]:
    """Those of some modules that FSDP2 shards."""
    fsdp, modules = sys.modules.get("torch.distributed.fsdp"), list(modules)
    if fsdp is None or not any(issubclass(kind, fsdp.FSDPModule) for kind in set(map(type, modules))):
        return []  # models have thousands of modules, of few kinds
    return [module for module in modules if isinstance(module, fsdp.FSDPModule)]


def reshard(module: nn.Module) -> None:
    """Let go of the unsharded weights that FSDP2 keeps after a forward: they are those of other weights.

    Its root module is never resharded by itself outside of a backward pass.
    """
    for each in sharded([module]):
        each.reshard()


def end_forward(module: Any) -> None:
    """Let FSDP2 forget a forward that an exception has broken off: the next one would take itself for its rest.

    It would not be resharded, and its backward pass would gather weights in
    another order than the other processes do. (Before torch 2.13 it cannot.)
    """
    if not hasattr(module, "reset_iter_state"):
        return
    state = module._get_fsdp_state()
    if state._is_root and state._state_ctx.iter_forward_root is not None:
        module.reset_iter_state()


def outermost(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Those of some modules that are inside none of the others, each once."""
    modules = list(dict.fromkeys(modules))
    inside = {id(part) for module in modules for part in module.modules() if part is not module}
    return [module for module in modules if id(module) not in inside]


def named_parameters(modules: Iterable[nn.Module]) -> dict[str, nn.Parameter]:
    """Parameters by name, a tied one by each of its names; those of a second module begin with ``1:``."""
    return {
        f"{i}:{name}" if i else name: parameter
        for i, module in enumerate(modules)
        for name, parameter in module.named_parameters(remove_duplicate=False)
    }


def has_fsdp(model: nn.Module) -> bool:
    """Whether a forward of this model gathers weights from other processes."""
    return bool(sharded(model.modules()))


def plain(model: nn.Module) -> Any:
    """The module inside `torch.compile` and DistributedDataParallel.

    The forward of the latter synchronises buffers, and not every process is in it.
    """
    inside = {"DistributedDataParallel": "module", "OptimizedModule": "_orig_mod"}
    while type(model).__name__ in inside:
        model = getattr(model, inside[type(model).__name__])
    return model


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel and the like, which do not pass on its accessors."""
    inner = getattr(model, "module", None)
    return inner if isinstance(inner, nn.Module) and not hasattr(model, "get_output_embeddings") else model
