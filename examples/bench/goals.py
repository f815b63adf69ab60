"""What the costs are meant to be, and whether they are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Goal:
    """One figure, in one or several parts that all have to be met."""

    what: str
    value: tuple[float, ...]
    goal: tuple[float, ...]
    stretch: tuple[float, ...] = ()
    unit: str = "{:.3g}"
    sign: str = "<="

    def _reaches(self, wanted: tuple[float, ...]) -> bool:
        pairs = zip(self.value, wanted, strict=True)
        return all(value >= limit if self.sign == ">=" else value <= limit for value, limit in pairs)

    @property
    def verdict(self) -> str:
        """Whether it is met."""
        if self.stretch and self._reaches(self.stretch):
            return "met (stretch)"
        return "met" if self._reaches(self.goal) else "missed"

    def shown(self, values: tuple[float, ...]) -> str:
        """Figures as text."""
        return " / ".join(self.unit.format(value) for value in values)

    def cells(self) -> list[str]:
        """A table row: what, measured, goal, stretch, verdict."""
        stretch = f"{self.sign} {self.shown(self.stretch)}" if self.stretch else ""
        return [self.what, self.shown(self.value), f"{self.sign} {self.shown(self.goal)}", stretch, self.verdict]


def step_goals(step: dict[str, Any]) -> Iterator[Goal]:
    """Of one kind of training."""
    methods, speedup = step["methods"], step["speedup"]
    commit, naive, bare = methods["STEP commit"], methods["naive commit"], methods["bare"]
    yield Goal("(STEP step - bare step) / plain control forward", (commit["overhead"]["median"],), (0.75,), (0.6,))
    yield Goal("audit's peak / naive audit's peak", (commit["peak_step"] / naive["peak_step"],), (0.05,), unit="{:.2%}")
    yield Goal("audit's peak / bare step's own peak", (commit["peak_step"] / bare["peak_run"],), (1.0,), unit="{:.2%}")
    yield Goal("snapshot / bare step", (commit["snapshot_of_bare"]["median"],), (0.005,), unit="{:.2%}")
    faster = tuple(speedup[how]["median"] for how in ("commit", "interpolate"))
    yield Goal("overhead of naive / overhead of STEP, commit / interpolate", faster, (3.0, 6.0), (4.0, 9.0), sign=">=")


def other_goals(sections: dict[str, Any]) -> Iterator[Goal]:
    """Of the searches and the numerics."""
    if "search" in sections:
        best = sections["search"]["searches"][sections["search"]["default"]]
        yield Goal(
            "audits beyond the first per triggered interpolation, mean / max",
            (best["mean"], float(best["max"])),
            (2.5, 5.0),
            (2.0, 5.0),
        )
    if "numerics" in sections:
        zero, *others = sections["numerics"]
        worst = max(point["step_optim"] for point in others)
        yield Goal("relative error of the mean KL, 1e-10 to 1, float32", (worst,), (1e-5,))
        yield Goal("KL read at zero movement", (zero["step_optim"],), (0.0,), sign="exactly")


def goals(sections: dict[str, Any], kind: str = "lora") -> list[Goal]:
    """All that were measured; they are stated for LoRA."""
    found = list(step_goals(sections["step"][kind])) if "step" in sections else []
    return found + (list(other_goals(sections)) if kind == "lora" else [])
