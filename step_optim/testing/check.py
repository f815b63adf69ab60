"""Try an optimizer under `STEPOptimizer`."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from typing import Any

import torch

from step_optim.controllers import Action
from step_optim.isolation import RNGState
from step_optim.param_like import ParamLike, known_copies, why_recomputed
from step_optim.testing.probe import Factory, Probe, Setup, TrainStep, brief
from step_optim.testing.probe import train_step as usual_step
from step_optim.testing.sticking import Sticking
from step_optim.testing.verdict import STICKS, Verdict

REJECTED_AT = (0, 0, 1, 4, 5, 5, 8)
"""Before which steps another one is rejected: before there is state, soon after, twice in a row, at other depths."""

STEPS = 12
SAVED_AT = 6


def check_optimizer(
    factory: Factory,
    *,
    dtype: torch.dtype = torch.float32,
    train_step: TrainStep = usual_step,
    param_like: ParamLike | None = None,
) -> Verdict:
    """Try an optimizer on a small model, bare and wrapped, and compare bit for bit.

    Rejected steps must leave no trace in weights, state, groups and attributes,
    nor in what is trained later; an infinite budget must change nothing; a
    checkpoint must load as that of the bare optimizer does; and a shrunk step
    must stay shrunk. That last check, the stick test, looks for copies of the
    weights in the optimizer's state, which would bring a movement back.

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
      restep      works
    >>> verdict.exact
    True
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
        verdict = replace(verdict, optimizer=type(probe.inner).__name__, param_like=_keys(probe, param_like))
        start = probe.weights
        moved = probe.train_all(range(STEPS)).weights - start
    except Exception as error:
        return replace(verdict, bare=brief(error))
    if not moved.isfinite().all() or not moved.any():
        return replace(verdict, bare="no step moves a weight" if not moved.any() else "the weights are not finite")
    try:
        Probe(setup, {})
    except (TypeError, ValueError) as error:
        return replace(verdict, refused=brief(error))
    rollback = _tried(_rollback, setup)
    if rollback:
        return replace(verdict, rollback=rollback)
    bare_round_trip, round_trip = _round_trip(setup)
    verdict = replace(verdict, commits=_tried(_commits, setup), bare_round_trip=bare_round_trip, round_trip=round_trip)
    return _shrinking(setup, verdict, {} if param_like is None else {"param_like": param_like})


def _keys(probe: Probe, param_like: ParamLike | None) -> tuple[str, ...]:
    if param_like is None:
        return known_copies(probe.inner)
    return () if callable(param_like) else (param_like,) if isinstance(param_like, str) else tuple(param_like)


def _tried(check: Any, setup: Setup) -> str:
    try:
        return str(check(setup))
    except Exception as error:
        return brief(error)


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


def _round_trip(setup: Setup) -> tuple[str, str]:
    """What is wrong with saving and loading the bare optimizer, and the wrapped one."""
    try:
        bare = _resumed(setup, None)
    except Exception as error:
        return f"the bare optimizer cannot be saved and loaded ({brief(error)})", ""
    survived = torch.equal(bare.weights, Probe(setup).train_all(range(STEPS)).weights)
    try:
        ours = bare.picture().difference(_resumed(setup, {}).picture())
    except Exception as error:
        ours = brief(error)
    return "" if survived else "the bare optimizer continues otherwise than without saving", ours


def _resumed(setup: Setup, options: dict[str, Any] | None) -> Probe:
    first, second = Probe(setup, options).train_all(range(SAVED_AT)), Probe(setup, options)
    file = io.BytesIO()
    torch.save(first.optimizer.state_dict(), file)
    file.seek(0)
    second.write(first.weights)
    second.optimizer.load_state_dict(torch.load(file, weights_only=False))
    return second.train_all(range(SAVED_AT, STEPS))


def _shrinking(setup: Setup, verdict: Verdict, options: dict[str, Any]) -> Verdict:
    test = Sticking(setup)
    verdict = replace(verdict, sticks=test.weights_only(), restep=test.restep())
    why = why_recomputed(Probe(setup).inner)
    if why is not None:
        return replace(verdict, shrink=f"it {why}", refuses_shrink=True, shrink_sticks=math.nan)
    try:
        half = test.half(**options)
    except Exception as error:
        return replace(verdict, shrink=brief(error), shrink_sticks=math.nan)
    if half >= STICKS or math.isnan(half):
        return replace(verdict, shrink_sticks=half)
    needs = test.needed()
    why = f"{half:.2f} of what is taken back stays away, the optimizer's state brings the rest back"
    return replace(verdict, shrink_sticks=half, shrink=why, needs=needs)
