"""Which policy drift is measured from, when a KL closure is bound in the middle of a run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from step_optim.audit.closure import KLClosure

ORIGINS = (None, "keep", "adapter_off", "now")
"""Values of ``bind(origin=)``."""


def settle_origin(kl: KLClosure, before: KLClosure | None, origin: str | None) -> None:
    """Give a KL closure the pi_ref that was asked for.

    Args:
        kl: is bound.
        before: was bound until now.
        origin: see `STEPOptimizer.bind`.

    Raises:
        ValueError: an unknown ``origin``, or a policy that nothing here knows.
    """
    if origin not in ORIGINS:
        raise ValueError(f"origin={origin!r} is unknown; use 'keep', 'adapter_off', 'now' or None")
    if origin is None:
        return
    if not kl.measures_drift:
        raise ValueError(f"origin={origin!r} is about pi_ref, and {kl!r} measures no drift; use TokenKL or PolicyKL")
    if origin == "now":
        kl.forget_origin()
    elif origin == "adapter_off":
        with adapters_off([*kl.modules(), *kl.used]):
            kl.take_origin()
    else:
        _keep(kl, before)


def _keep(kl: KLClosure, before: KLClosure | None) -> None:
    """Take pi_ref from the closure that was bound, or leave the one that this closure brings along."""
    if before is not None and before is not kl and (kl.sharded or before.sharded):
        raise ValueError(
            "origin='keep': with shard=True each process knows pi_ref on its own part of the prompts only; use "
            "shard=False, or origin='adapter_off' or 'now'"
        )
    if before is not None and before is not kl and kl.take_origin_from(before):
        return
    if not kl.has_origin:
        raise ValueError(
            "origin='keep': nothing knows what pi_ref said on all of these prompts, with these responses. Bind prompts "
            "that were in the run from its start (of its control set, pool or held-out set; a new pool or held-out "
            "set has to be known, too); with PEFT take origin='adapter_off'; or let drift begin anew with origin='now'"
        )


@contextmanager
def adapters_off(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Switch PEFT's adapters off: the model is what it was before it had any.

    Raises:
        ValueError: there are none.
    """
    inside = [part for module in modules for part in module.modules()]
    peft: list[Any] = [part for part in inside if hasattr(part, "peft_config") and hasattr(part, "disable_adapter")]
    if not peft:
        raise ValueError(
            "origin='adapter_off': no module of the KL closure is a PEFT model, whose adapter could be switched off; "
            "use origin='keep' or 'now', and name a model that a function calls, PolicyKL(fn, model=...)"
        )
    trained = [(p, p.requires_grad) for part in inside for p in part.parameters(recurse=False)]
    try:
        with ExitStack() as off:
            for part in peft:
                off.enter_context(part.disable_adapter())
            yield
    finally:
        for p, requires_grad in trained:  # PEFT decides anew what is trained
            p.requires_grad_(requires_grad)
