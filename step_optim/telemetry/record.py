"""What happened at a step: the record."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from step_optim.controllers.base import Action
from step_optim.limits import Limits
from step_optim.movement import Movement

ROOT = "step_optim"
"""What the names of a flat record begin with."""

MAPPINGS = (
    "candidate_bounds",
    "accepted_bounds",
    "layers",
    "projection",
    "steering",
    "pull",
    "generalisation",
    "fixed_budget",
    "seconds",
)
"""Fields of a record that are numbers by name."""


@dataclass(frozen=True)
class TrialRecord:
    """One audit of a point that a controller tried."""

    alpha: float | None
    """The part of the update, on the way to the candidate; None for weights off it."""
    movement: Movement
    """K_global and K_s there [nats per token]."""
    feasible: bool
    """Whether every budget held there."""


@dataclass(frozen=True)
class StepRecord:
    """Everything about one step. KL figures are in nats per token, times in seconds.

    >>> record = StepRecord(0, Action.COMMIT, Movement(0.01), Movement(0.01), Limits(mean=0.03))
    >>> StepRecord.from_dict(record.to_dict()) == record
    True
    """

    step: int
    """Step index t, counted from 0; rejected steps count."""
    action: Action
    """What became of the step: commit, reject, shrink, project, steer or unchanged."""
    candidate: Movement
    """Movement of what the inner optimizer proposed; NaN if the update itself was not finite."""
    accepted: Movement
    """Movement of what was committed: zero after a rejection."""
    budget: Limits
    """The budgets in force. Of those that ``lowered`` names it has what a cap on the path had left."""
    triggered: bool = False
    """Whether the candidate was infeasible, so that the controller acted."""
    bound: str | None = None
    """The constraint with the largest KL / budget at the candidate: mean, slice:<name>, prompt, token, drift,
    drift:<name>; path or path:<name> where what a cap on the path had left was less than the budget of the step."""
    candidate_bounds: Mapping[str, float] = field(default_factory=dict)
    """With `Budget(confidence=)`, the upper confidence bounds of the candidate that were judged, by constraint."""
    accepted_bounds: Mapping[str, float] = field(default_factory=dict)
    """The same of what was committed."""
    exceeded_before: tuple[str, ...] = ()
    """Caps on the drift that the policy before the step exceeded already: of these, less drift than before was asked,
    and no more (a cap was lowered, or the run resumed with a lower one)."""
    alpha: float | None = None
    """Part of the update that was committed, as asked for: 1 after a commit, 0 after a rejection, None off the line."""
    alpha_realised: float | None = None
    """The part that rounding made of it; differs in low precision."""
    progress: float | None = None
    """Share of the candidate's first-order decrease of the loss that was kept: -<g, x - theta_t> over -<g, candidate -
    theta_t>, with g the gradient at the step; of a window or a loss closure, whose gradients are many, the step itself
    in the place of -g. 1 after a commit, 0 after a rejection; None if the candidate promised no decrease."""
    kept: int = 0
    """With ``keep=``, how many tensors kept their whole step though the others did not: the KL closure does not read
    them. ``alpha`` and ``alpha_realised`` are about the others, ``progress`` is about all."""
    probes: int = 0
    """Audits and gradients that told which tensors those are."""
    layers: Mapping[str, float] = field(default_factory=dict)
    """By layer, the part of its update that was committed, with `Interpolate(by_layer=...)`; alpha is that of all."""
    trials: tuple[TrialRecord, ...] = ()
    """Audits beyond the candidate's, in order."""
    stalled: bool = False
    """Whether a gate's patience was used up."""
    projection: Mapping[str, float] = field(default_factory=dict)
    """Of `Project`: residual (mean ‖l - l_candidate‖²), residual_target, residual_interpolation, steps;
    strength_min and strength_max: the smallest and largest lambda of a prompt in the mixture aimed at."""
    steering: Mapping[str, float] = field(default_factory=dict)
    """Of `Steer`: corrections (gradients that were measured), remembered (normals it began with), and the multiplier
    of each constraint, multiplier/<constraint>."""
    pull: Mapping[str, float] = field(default_factory=dict)
    """How strongly caps pulled at the step, with `Steer(pull=True)`: shares of the loss's gradient, by cap."""
    previous_drift: Movement | None = None
    """Movement of the policy before the step from pi_ref; None if no cap is finite."""
    candidate_drift: Movement | None = None
    """Movement of the candidate from pi_ref; None if no cap is finite."""
    reference_drift: Movement | None = None
    """Movement of the committed policy from pi_ref; None if the KL closure does not measure it."""
    held_out: Movement | None = None
    """Movement on the held-out prompts, which decide nothing; None in steps that do not measure it."""
    held_out_drift: Movement | None = None
    """Drift from pi_ref there."""
    generalisation: Mapping[str, float] = field(default_factory=dict)
    """Held-out over control: ``step`` the ratio of the movements, ``drift`` that of the drifts; ``step_error`` and
    ``drift_error`` the standard errors of their logarithms, from the spread over prompts (wider for few of them: 1.96
    standard errors are Student's 95 % interval). 1 if the figures carry."""
    held_out_error: str | None = None
    """What went wrong in a held-out audit that was due; the step has nothing to do with it."""
    fixed_budget: Mapping[str, float] = field(default_factory=dict)
    """The budgets that `Budget.auto` was fixed at by this step, by constraint; in force from the next one on."""
    update_norm: float = 0.0
    """L2 norm of candidate - previous weights."""
    lr: tuple[float, ...] = ()
    """Learning rate of each parameter group at this step."""
    scale: float = 1.0
    """What the proposal multiplied them by, under ``adaptive_rate``."""
    reference_renewed: bool = False
    """Whether somebody else has written weights since the last step, so that the reference was taken anew."""
    reward: float | None = None
    """From `note(reward=...)`."""
    success: bool = True
    """False if something went wrong (see ``error``); or from `note(success=...)`."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Time by phase: inner, snapshot, audit (reference, candidate and drift), search (trials). And elapsed: from the
    end of the step before to the end of this one, with all that the training loop did; not in a process's first."""
    error: str | None = None
    """What went wrong, if something did: an exception, or a candidate that is not finite."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """Anything else from `note(...)`."""

    @property
    def constraint(self) -> str | None:
        """What the controller had to deal with: ``bound``, or ``"not finite"``; None if the step was not triggered."""
        if not self.triggered:
            return None
        return "not finite" if self.bound is None or not self.candidate.is_finite else self.bound

    @property
    def shows_movement(self) -> bool:
        """Whether it says how far a step moves the policy: the candidate was measured, is finite, and moved it."""
        return self.action is not Action.UNCHANGED and self.error is None and 0 < self.candidate.mean < math.inf

    @property
    def audits(self) -> int:
        """How often movement was measured: at the candidate, at trials, and to tell what is read."""
        return len(self.trials) + (self.action is not Action.UNCHANGED) + self.probes

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; NaN and infinities become the texts "NaN", "Infinity" and "-Infinity"."""
        plain: dict[str, Any] = jsonable({f.name: getattr(self, f.name) for f in fields(self)})
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> StepRecord:
        """Read what `to_dict` returned; fields of newer versions are ignored."""
        values = {f.name: plain[f.name] for f in fields(cls) if f.name in plain}
        values["step"], values["action"] = int(values["step"]), Action(values["action"])
        values["candidate"], values["accepted"] = (
            _movement(values["candidate"]),
            _movement(values["accepted"]),
        )
        limits = values["budget"]
        cap = limits.get("drift", limits.get("reference", math.inf))  # its name in older logs
        caps = _floats(limits.get("drift_slices", {}))
        values["budget"] = Limits(
            float(limits["mean"]),
            _floats(limits["slices"]),
            float(cap),
            caps,
            prompt=float(limits.get("prompt", math.inf)),
            token=float(limits.get("token", math.inf)),
            confidence=_float(limits.get("confidence")),
            path=float(limits.get("path", math.inf)),
            path_slices=_floats(limits.get("path_slices", {})),
            lowered=tuple(limits.get("lowered", ())),
        )
        values["exceeded_before"] = tuple(values.get("exceeded_before", ()))
        values["trials"] = tuple(
            TrialRecord(_float(trial["alpha"]), _movement(trial["movement"]), trial["feasible"])
            for trial in values.get("trials", ())
        )
        for name in ("previous_drift", "candidate_drift", "reference_drift", "held_out", "held_out_drift"):
            values[name] = None if values.get(name) is None else _movement(values[name])
        for name in ("alpha", "alpha_realised", "progress", "update_norm", "reward"):
            values[name] = _float(values.get(name))
        values["kept"], values["probes"] = int(values.get("kept", 0)), int(values.get("probes", 0))
        values["lr"] = tuple(float(lr) for lr in values.get("lr", ()))
        values["scale"] = float(values.get("scale", 1.0))
        for name in MAPPINGS:
            values[name] = _floats(values.get(name, {}))
        return cls(**values)

    def flat(self, root: str = ROOT, spell: Callable[[str], str] = str) -> dict[str, float | str]:
        """Return scalars under slash-separated names, as experiment trackers like them; a list of notes is one text.

        Args:
            root: what all names begin with.
            spell: writes each part of a name after it.
        """
        notes = {
            name: " ".join(map(str, value)) if isinstance(value, list) else value for name, value in self.notes.items()
        }
        values = self.to_dict() | {"trials": len(self.trials), "notes": jsonable(notes)}
        return dict(_flatten(values, root, spell))


def jsonable(value: Any) -> Any:
    """Return plain JSON values; NaN and infinities become texts."""
    if isinstance(value, Action):
        return value.value
    if isinstance(value, Movement):
        return jsonable(value.to_dict())
    if isinstance(value, (Limits, TrialRecord)):
        return jsonable({f.name: getattr(value, f.name) for f in fields(value)})
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    return value


def _float(value: Any) -> float | None:
    return None if value is None else float(value)


def _floats(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items()}


def _movement(plain: Mapping[str, Any]) -> Movement:
    prompt, token = _float(plain.get("prompt")), _float(plain.get("token"))
    return Movement(float(plain["mean"]), _floats(plain["slices"]), prompt, token)


def _flatten(value: Any, name: str, spell: Callable[[str], str]) -> Iterator[tuple[str, float | str]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flatten(item, f"{name}/{spell(key)}", spell)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _flatten(item, f"{name}/{i}", spell)
    elif value is not None:
        yield name, float(value) if value in ("NaN", "Infinity", "-Infinity") else value
