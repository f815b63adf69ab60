"""What an attribution says: which part of a step moved which slice."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from step_optim.movement import Movement
from step_optim.telemetry.record import jsonable

WIDTH = 100
"""Characters of a note in the table's head."""


@dataclass(frozen=True)
class Part:
    """One part of a step: what the candidate reads without it. KL figures are in nats per token.

    Constraints have the names of `Verdict.ratios`: ``"mean"``, ``"slice:<name>"``, ``"drift"`` and so on.
    """

    name: str
    """Of the group, layer or module; or "the rest (n parts)"."""
    tensors: int
    """How many tensors it has; those that share memory are one."""
    share: float
    """Its share of ‖candidate - theta_t‖², 0 to 1; NaN where the update is not finite."""
    without: Movement
    """K_global and K_s of the candidate with this part rolled back to theta_t. NaN where the remaining update is not
    finite."""
    without_drift: Movement | None = None
    """Drift from pi_ref there; None if the step had no cap on the drift."""
    effect: Mapping[str, float] = field(default_factory=dict)
    """K(candidate) - K(without the part), by constraint. Below 0 where the part held others back."""
    first_order: Mapping[str, float] = field(default_factory=dict)
    """<grad K(candidate), delta of the part>, by constraint, of those whose gradient was measured."""

    @property
    def most(self) -> str | None:
        """The slice on which this part has the largest effect; None if it has none on any."""
        slices = {name: effect for name, effect in self.effect.items() if name.startswith("slice:")}
        known = {name: effect for name, effect in slices.items() if effect != 0 and not math.isnan(effect)}
        return max(known, key=known.__getitem__).removeprefix("slice:") if known else None


@dataclass(frozen=True)
class Attribution:
    """Which part of a step moved which slice: the candidate of one step, with one part after the other rolled back.

    effect_p = K(candidate) - K(candidate with part p at theta_t), in nats per
    token. Effects do not add up to K(candidate): K is about quadratic, so each
    of two parts that move one logit together counts their product whole. Nor
    do the first-order predictions <grad K(candidate), delta_p>: for a quadratic
    K they sum to 2 K(candidate), and each is the part's effect plus K of its
    delta alone. A part of a small share of the update with a large effect is
    what to look at.
    """

    step: int
    """The step index."""
    by: str
    """What the parts are."""
    constraint: str
    """What bound at the candidate, by its name in `Verdict.ratios`; the table is about this one."""
    candidate: Movement
    """K_global and K_s of the candidate, measured again."""
    candidate_drift: Movement | None
    """Its drift from pi_ref; None if the step had no cap on the drift."""
    parts: tuple[Part, ...]
    """The part with the largest effect on the constraint first."""
    audits: int
    """How many audits it took, the candidate's among them; without that of theta_t's policy, the reference."""
    gradients: int
    """How many gradients it took: a forward and a backward pass over the control set each."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """What `note` said of the step: the ids of its batch, say."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; NaN and infinities become texts, as in `StepRecord.to_dict`."""
        parts = [jsonable({f.name: getattr(part, f.name) for f in fields(part)}) for part in self.parts]
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "parts"}
        return {**jsonable(plain), "parts": parts}

    def __str__(self) -> str:
        """A table, the worst part first, for the constraint that bound."""
        figure = figures(self.candidate, self.candidate_drift, tails=True)[self.constraint]
        head = ["part", "of ‖update‖²", "K without", "effect", "first order", "most on"]
        rows = [self._row(part) for part in self.parts]
        if not any(row[-1] for row in rows):
            head, rows = head[:-1], [row[:-1] for row in rows]
        title = f"step {self.step}, {self.constraint}: the candidate reads {figure:.3g} nats per token"
        notes = [f"{name}: {_listed(value)}" for name, value in self.notes.items()]
        return "\n".join([title, *notes, *_aligned([head, *rows], left=(0, 5))])

    def _row(self, part: Part) -> list[str]:
        name, first = self.constraint, part.first_order.get(self.constraint)
        without = figures(part.without, part.without_drift, tails=True).get(name, math.nan)
        shown = [f"{part.share:.1%}", f"{without:.3g}", f"{part.effect.get(name, math.nan):.3g}"]
        return [part.name, *shown, "" if first is None else f"{first:.3g}", part.most or ""]


def figures(movement: Movement, drift: Movement | None, *, tails: bool = False) -> dict[str, float]:
    """Return what a point reads, by the names of the constraints.

    Args:
        movement: K_global and K_s.
        drift: from pi_ref, if there is a cap on it.
        tails: the worst prompt and token too, where they are known.

    >>> figures(Movement(0.02, {"math": 0.01}), Movement(0.5))
    {'mean': 0.02, 'slice:math': 0.01, 'drift': 0.5}
    """
    found = {"mean": movement.mean} | {f"slice:{name}": kl for name, kl in movement.slices.items()}
    if tails:
        found |= {name: kl for name in ("prompt", "token") if (kl := getattr(movement, name)) is not None}
    if drift is not None:
        found |= {"drift": drift.mean} | {f"drift:{name}": kl for name, kl in drift.slices.items()}
    return found


def _listed(value: Any) -> str:
    """A note, or as many parts of it as fit on a line."""
    shown = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return shown if len(shown) <= WIDTH else f"{shown[: WIDTH - 4]} ..."


def _aligned(rows: Sequence[Sequence[str]], left: Sequence[int]) -> list[str]:
    """Columns of one width each: texts at these places begin at the left, numbers end at the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = zip(row, widths, strict=True)
        lines.append("  ".join(c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(cells)).rstrip())
    return lines
