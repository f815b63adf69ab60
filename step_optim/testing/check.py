"""Try an optimizer under `STEPOptimizer`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from step_optim.controllers import Action
from step_optim.host.rng import RNGState
from step_optim.snapshot.known import ParamLike, known_copies, why_recomputed
from step_optim.testing.probe import Factory, Probe, Setup, TrainStep, brief
from step_optim.testing.probe import train_step as usual_step
from step_optim.testing.resuming import check_resuming
from step_optim.testing.sticking import Sticking
from step_optim.testing.verdict import STICKS, Finding, Verdict

REJECTED_AT = (0, 0, 1, 4, 5, 5, 8)
"""Before which steps another one is rejected: before there is state, soon after, twice in a row, at other depths."""

STEPS = 12


def check_optimizer(
    factory: Factory,
    *,
    dtype: torch.dtype = torch.float32,
    train_step: TrainStep = usual_step,
    param_like: ParamLike | None = None,
) -> Verdict:
    """Try an optimizer on a small model, bare and wrapped, and compare bit for bit.

    * Rejected steps (before steps 0, 0, 1, 4, 5, 5, 8, each on a gradient of its
      own) leave no trace in weights, gradients, state, groups and attributes,
      object identity and sharing included, nor in what is trained later.
    * An infinite budget changes nothing.
    * A checkpoint goes on as that of the bare optimizer does: the wrapper's own,
      the wrapper's in the bare optimizer, the bare one's in the wrapper; read
      with ``weights_only=True`` if that reads the bare one's.
    * Half a step, theta_t + (theta~ - theta_t) / 2, is on that line to the bit,
      and stays half a step: the stick test. With w the weights after it, c those
      after the whole step, and primes for both after zero-gradient steps, the
      share of what was taken back that stays away is <c' - w', c - w> / ‖c - w‖².
      Copies of the weights in the optimizer's state would bring the rest back.
    * The inner step again at lr / 16 makes about a sixteenth of the step.

    Args:
        factory: makes the optimizer for a list of parameters: matrices of shapes
            [80, 64] and [64, 80], and a vector of shape [80] between them.
        dtype: of the weights.
        train_step: trains one step, for optimizers that need a loss closure,
            second derivatives or further arguments of step().
        param_like: as for `STEPOptimizer`: where copies of the weights are.

    Returns:
        The verdict. Nothing is raised for what the optimizer does wrong.

    >>> verdict = check_optimizer(torch.optim.AdamW)
    >>> print(verdict)
    AdamW, float32: exact
      rollback    bit for bit
      commits     as without the wrapper, bit for bit
      state_dict  continues as the bare optimizer does
      shrink      1.00 of what was taken back stays away
    >>> verdict.verdict, bool(verdict.rollback)
    (<Kind.EXACT: 'exact'>, True)
    """
    rng = RNGState.capture()
    try:
        return _check(Setup(factory, dtype, train_step), param_like)
    finally:
        rng.restore()


def _check(setup: Setup, param_like: ParamLike | None) -> Verdict:
    verdict = Verdict("", setup.dtype)
    try:
        probe = Probe(setup)
        verdict = replace(verdict, optimizer=type(probe.inner).__name__)
        start = probe.weights
        moved = probe.train_all(range(STEPS)).weights - start
        verdict = replace(verdict, runs=Finding(_is_training(moved)))
    except Exception as error:
        return replace(verdict, runs=Finding(brief(error)))
    verdict = replace(verdict, accepted=_tried(_accepted, setup)) if verdict.runs else verdict
    verdict = replace(verdict, rollback=_tried(_rollback, setup)) if verdict.accepted else verdict
    if not verdict.rollback:
        return verdict
    verdict = replace(verdict, param_like=_keys(probe, param_like))
    bare, ours = check_resuming(setup, STEPS)
    verdict = replace(verdict, transparent=_tried(_commits, setup), resumes_bare=bare, resumes=ours)
    return _shrinking(setup, verdict, {} if param_like is None else {"param_like": param_like})


def _is_training(moved: Tensor) -> str:
    if not moved.isfinite().all():
        return "the weights are not finite"
    return "" if moved.any() else "no step moves a weight"


def _keys(probe: Probe, param_like: ParamLike | None) -> tuple[str, ...]:
    """The keys of copies that are really there; the name of a function that finds some."""
    given = known_copies(probe.inner) if param_like is None else param_like
    if callable(given):
        return (getattr(given, "__name__", repr(given)),) if list(given(probe.inner)) else ()
    states = [probe.inner.state.get(p, {}) for p in probe.parameters]
    return tuple(
        key for key in ((given,) if isinstance(given, str) else given) if any(key in state for state in states)
    )


def _tried(check: Callable[[Setup], str], setup: Setup) -> Finding:
    try:
        return Finding(check(setup))
    except Exception as error:
        return Finding(brief(error))


def _accepted(setup: Setup) -> str:
    Probe(setup, {})
    return ""


def _rollback(setup: Setup) -> str:
    """Compare a run with rejected steps, each on a gradient of its own, with the bare run without them."""
    probe = Probe(setup, {})
    kept, seed, rejected = [], 1000, 0
    for step in range(STEPS):
        for _ in range(REJECTED_AT.count(step)):
            seed += 10
            action, trace = probe.reject(seed)
            if trace:
                return f"after a rejection at step {step}, {trace}"
            rejected += action is Action.REJECT
            kept += [seed] if action is not Action.REJECT else []
        probe.train(step)
        kept.append(step)
    if not rejected:
        return "no step could be rejected: none of those tried moved a weight"
    return Probe(setup).train_all(kept).picture().difference(probe.picture())


def _commits(setup: Setup) -> str:
    probes = [Probe(setup, options).train_all(range(STEPS)) for options in (None, {"budget": math.inf})]
    return probes[0].picture().difference(probes[1].picture())


def _shrinking(setup: Setup, verdict: Verdict, options: dict[str, Any]) -> Verdict:
    test = Sticking(setup)
    verdict = replace(verdict, sticks=test.weights_only())
    why = why_recomputed(Probe(setup).inner)
    if why is not None:
        return replace(verdict, interpolates=Finding(f"it {why}"), refuses_shrink=True)
    try:
        half = test.half(**options)
    except Exception as error:
        return replace(verdict, interpolates=Finding(brief(error)))
    verdict = replace(verdict, half_sticks=half)
    if test.off_the_line:
        return replace(verdict, interpolates=Finding(test.off_the_line))
    if half >= STICKS or math.isnan(half):
        return replace(verdict, interpolates=Finding())
    why = f"{half:.2f} of what is taken back stays away, the optimizer's state brings the rest back"
    return replace(verdict, interpolates=Finding(why), needs=test.needed())
