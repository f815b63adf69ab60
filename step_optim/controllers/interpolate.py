"""Interpolate: the largest part of the step that the budgets allow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from step_optim.controllers.base import Controller, Outcome, Trial, checked_on_reject, checked_on_shrink
from step_optim.controllers.layers import OTHERS, UNNAMED, ByLayer, check_by_layer, layer_weights
from step_optim.controllers.searches import SEARCHES, ModelSearch, Search, check_profile


@dataclass(frozen=True, repr=False)
class Interpolate(Controller):
    """Commit theta_t + alpha (candidate - theta_t) for the largest feasible alpha (the paper's section 3.3).

    The optimizer state stays the candidate's: for Adam-like optimizers the
    result is a step at lr * alpha. If no alpha is feasible within
    ``max_trials``, the step is rejected.

    Raises:
        ValueError: an argument out of range, or an unknown option.

    >>> Interpolate(tol=0.1, memory=False).line == Interpolate(ModelSearch(tol=0.1, memory=False)).line
    True
    """

    search: str | Search = "model"
    """``"model"`` (about 2.4 audits at tol=0.01), ``"bisect"`` (about 9), or ``"backtrack"`` (halve until feasible,
    then bisect; with tol=0.5 plain backtracking); or a search with its options, `ModelSearch(strict=True)`, say."""

    tol: float = 0.01
    """Relative tolerance in alpha."""

    max_trials: int = 24
    """Audits at most; see `Search`."""

    strict: bool = False
    """Of the model search; see `ModelSearch`."""

    memory: bool = True
    """Of the model search; see `ModelSearch`."""

    min_alpha: float = 1e-4
    """The smallest alpha worth committing; see `Search`."""

    on_reject: str = "restore"
    """``"restore"`` or ``"keep_state"``, if no alpha is feasible."""

    on_shrink: str = "keep_state"
    """The optimizer state of a step that was shrunk: ``"keep_state"`` the candidate's, ``"restore"`` theta_t's. In a
    window, gradients that were taken far beyond the budget stay in the candidate's moments; without them the next
    update gained more held-out reward, on 8 of 9 occasions (the branches in examples/study/REPORT.md)."""

    by_layer: ByLayer | None = field(default=None, hash=False)
    """Shorten some layers more than others: ``"linear"`` makes a layer's part grow with its depth; a mapping gives
    weights by name pattern (``{"*.layers.0.*": 0.5}``; others have 1, and so has what no module of the policy names), a
    function by name. A layer of twice the weight makes twice the part of its step, and the whole of it at most; alpha
    is the share of the whole step (see `Path`), the record's ``layers`` has each layer's part."""

    def __post_init__(self) -> None:
        """Check the arguments."""
        if isinstance(self.search, Search):
            own = {f.name for f in fields(ModelSearch)}
            given = [f.name for f in fields(self) if f.name in own and getattr(self, f.name) != f.default]
            if given:
                raise ValueError(
                    f"{given[0]}={getattr(self, given[0])!r} stands beside search={self.search!r}, which has its own "
                    "options: give them to the search alone"
                )
        elif self.search not in SEARCHES:
            raise ValueError(f"search={self.search!r} is unknown; use one of {tuple(SEARCHES)}")
        check_by_layer(self.by_layer)
        self.line  # noqa: B018 - refuses what is out of range
        checked_on_reject(self.on_reject)
        checked_on_shrink(self.on_shrink)

    @property
    def line(self) -> Search:
        """The search on the line from theta_t to the candidate, with its options."""
        if isinstance(self.search, Search):
            return self.search
        kind = SEARCHES[self.search]
        return kind(**{f.name: getattr(self, f.name) for f in fields(kind)})

    def __repr__(self) -> str:
        hidden = {f.name for f in fields(ModelSearch)} if isinstance(self.search, Search) else set()
        shown = (f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if f.name not in hidden)
        return f"{type(self).__name__}({', '.join(shown)})"

    def decide(self, trial: Trial) -> Outcome:
        """Shrink to the budget, or reject."""
        parts_of = None if self.by_layer is None else _bent(self.by_layer, trial)
        found = self.line.find(trial)
        if found is None:
            return trial.reject()
        if parts_of is None or found.alpha is None:  # a search of one's own may leave the way
            return trial.accept(found)
        return trial.accept(found, layers=parts_of(found.alpha))

    def check_names(self, names: Sequence[str]) -> None:
        """Refuse a rule that says nothing about a model with these names."""
        if self.by_layer is not None:
            layer_weights(self.by_layer, names)

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """Refuse what is no profile."""
        check_profile(state)


def _bent(by_layer: ByLayer, trial: Trial) -> Callable[[float], dict[str, float]]:
    """Bend the way to the candidate; return what tells each layer's part at an alpha."""
    names = trial.names()
    moved = {name: place for name, place in names.items() if place is not None}
    if not moved:
        raise ValueError(
            f"by_layer={by_layer!r}: no tensor of the optimizer is a named parameter of the policy's modules, so that "
            "none has a layer; use by_layer=None"
        )
    layers: dict[int, tuple[str, float]] = {}
    for name, layer in layer_weights(by_layer, list(names)).items():
        place = moved.get(name)
        if place is not None and layers.get(place, OTHERS)[0] == OTHERS[0]:  # of two names of one tensor, the first
            layers[place] = layer
    chosen = [layers.get(place, UNNAMED) for place in range(len(trial.weights.previous))]
    parts = trial.bend([weight for _, weight in chosen])
    return lambda alpha: {name: part for (name, _), part in zip(chosen, parts(alpha), strict=True)}
